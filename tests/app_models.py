"""Runs for the app's tests: tiny models with records, a report, and models that say what they are told to."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eval_models
import torch
from compare_models import write_model

from trueup.app.conversation import Arena
from trueup.app.models_pool import Entry, Loaded, ModelPool, find_entries
from trueup.app.votes import VoteStore

MARK = "MARK of the report"


def write_runs(folder: Path) -> Path:
    """A chat model, one tuned from it, a base model, a damaged one, a reward model, and a comparison."""
    sft = write_model(folder / "sft", "sft")
    write_model(folder / "dpo", "dpo", seed=1, parents={"model_name_or_path": sft})
    write_model(folder / "base", "pretrain", seed=2)
    write_model(folder / "reward", "reward", kind="reward")
    damaged = write_model(folder / "damaged", "sft", seed=3)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (folder / "sft.work").mkdir()
    comparison = folder / "compare"
    (comparison / "samples").mkdir(parents=True)
    (comparison / "verdict.json").write_text("{}")
    (comparison / "report.html").write_text(
        f"<h1>{MARK}</h1><script>parent.hurt = 1; top.hurt = 1</script>${{x}}"
    )
    rows = [{"prompt": [{"role": "user", "content": f"what is {n}?"}], "family": n % 2} for n in range(6)]
    (comparison / "samples" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Parrot:
    """In place of a model: says `words`, a token each, slowly if wanted, then ends its turn."""

    def __init__(self, words: list[str], pause: float = 0.0) -> None:
        self.tokenizer = eval_models.tokenizer().__class__.from_pretrained(_tokenizer_folder())
        self.tokenizer.add_tokens(words)
        self.script = [*self.tokenizer.convert_tokens_to_ids(words), self.tokenizer.eos_token_id]
        self.pause = pause
        self.config = eval_models.config("gpt", max_position_embeddings=1 << 20)
        self.generation_config = None
        self.device = torch.device("cpu")

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, **inputs: Any) -> Any:
        time.sleep(self.pause)
        place = getattr(past_key_values, "said", 0)
        past_key_values.said = place + 1
        logits = torch.zeros(1, 1, len(self.tokenizer))
        logits[..., self.script[place]] = 1e4
        return type("Output", (), {"logits": logits})

    def loaded(self, name: str) -> Loaded:
        return Loaded(name, name.ljust(64, "0"), {}, 0, self, self.tokenizer)


def _tokenizer_folder() -> str:
    import tempfile

    folder = tempfile.mkdtemp()
    eval_models.tokenizer().save_pretrained(folder)
    return folder


def make_arena(
    runs: Path, votes: Path, parrots: dict[str, Parrot] | None = None, memory: int = 1 << 30
) -> Arena:
    """The runs of a folder, and parrots among them."""
    entries = [*find_entries([str(runs)]), *(Entry(name, name, "chat") for name in parrots or {})]
    pool = ModelPool(entries, memory)
    for name, parrot in (parrots or {}).items():
        pool.loaded[name] = parrot.loaded(name)
    return Arena(pool, VoteStore(votes))


@dataclass
class Site:
    """An app that is being served."""

    url: str
    arena: Arena


@contextmanager
def serving(arena: Arena, **options: Any) -> Iterator[Site]:
    """The app on a free port of this machine."""
    from trueup.app.ui_page import build_page, serve_page

    page = build_page(arena)
    _, url, _ = serve_page(page, "127.0.0.1", None, share=False, **options)
    try:
        yield Site(url, arena)
    finally:
        page.close(verbose=False)
