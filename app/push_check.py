"""Verified before anything goes up: the folder is opened as a stranger would, in a process without trueup."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trueup.app import push_probe
from trueup.app.push_files import Parcel
from trueup.recipes.directory import RECORD, read_json
from trueup.recipes.errors import TrueupError

MAX_NEW_TOKENS = 256
_HEADS = {"causal-lm": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}
# Not the process's business: it is offline, and runs what the folder brings.
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")


@dataclass(frozen=True)
class Findings:
    """What was seen.

    Args:
        seen: what holds, in words.
        remarks: what is no error, and should be known.
    """

    seen: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[str]]:
        """For machines."""
        return asdict(self)


def verify(parcel: Parcel) -> Findings:
    """Open what goes up in a clean process, offline, and compare it with what is here.

    Raises:
        TrueupError: it cannot be opened there, or is not what it is here; names all that is wrong.
    """
    return _verify_rows(parcel) if parcel.kind == "dataset" else _verify_model(parcel)


def _verify_rows(parcel: Parcel) -> Findings:
    files = [path for name, path in parcel.files.items() if name.endswith(".jsonl")]
    written = sum(1 for path in files for line in path.open("rb") if line.strip())
    read = _probe({"folder": str(parcel.folder)}, parcel)["rows"]
    if sum(read.values()) != written:
        raise TrueupError(
            f"{parcel.source}: load_dataset reads {sum(read.values()):,} rows ({_listed(read)}), and the "
            f"files hold {written:,}; every row must be a JSON object with the same columns"
        )
    return Findings([f"load_dataset reads {_listed(read)}"])


def _listed(rows: dict[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in rows.items())


def _verify_model(parcel: Parcel) -> Findings:
    config = read_json(parcel.folder / "config.json")
    if not (parcel.folder / "tokenizer_config.json").exists():
        raise TrueupError(f"{parcel.source}: holds no tokenizer; save the model's there (save_pretrained)")
    names = config.get("architectures") or [""]
    kind = "reward" if names[0].endswith("ForSequenceClassification") else "causal-lm"
    record = read_json(parcel.folder / RECORD) if (parcel.folder / RECORD).exists() else {}
    template = "chat_template" in read_json(parcel.folder / "tokenizer_config.json")
    template |= (parcel.folder / "chat_template.jinja").exists()
    chat = template and kind == "causal-lm" and record.get("stage") != "pretrain"
    remote = bool(config.get("auto_map"))
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.safetensors"
        request = {
            "folder": str(parcel.folder),
            "head": _HEADS[kind],
            "remote": remote,
            "max_new_tokens": MAX_NEW_TOKENS if chat else 0,
            "logits": str(logits),
        }
        found = _probe(request, parcel)
        problems = [*_problems(found, kind), *_differing(parcel, kind, logits)]
    if problems:
        listed = "\n  ".join(problems)
        raise TrueupError(f"{parcel.source}: not fit to be published:\n  {listed}")
    return _told(found, remote, kind)


def _problems(found: dict[str, Any], kind: str) -> list[str]:
    problems = []
    if found["missing"]:
        listed = ", ".join(found["missing"][:3])
        problems.append(f"weights: {listed} would be newly initialised; the files lack them")
    if found["wants_tied"] and not found["tied"]:
        problems.append(
            "weights: tie_word_embeddings is true, and embedding and output layer are two matrices"
        )
    eos = found["eos"]
    end = eos["tokenizer"]
    if end is None:
        return [*problems, "tokenizer: has no eos token, so nothing it says could end; set eos_token"]
    for name in ("config", "generation_config") if kind == "causal-lm" else ("config",):
        ends = eos[name] if isinstance(eos[name], list) else [eos[name]]
        if end not in ends:
            said = "none" if eos[name] is None else eos[name]
            problems.append(
                f"{name}.json: eos_token_id is {said}, and the tokenizer's is {end} ({found['eos_token']}): "
                f"replies would not end there; set it to {end}"
            )
    return problems


def _differing(parcel: Parcel, kind: str, file: Path) -> list[str]:
    """Whether the model computes there what it computes here."""
    import torch
    from safetensors.torch import load_file
    from transformers.utils.logging import disable_progress_bar

    from trueup.base.adapters import TOLERANCE
    from trueup.eval.loading import load_policy, load_reward_model

    disable_progress_bar()
    model: Any = (load_policy if kind == "causal-lm" else load_reward_model)(parcel.source)[0]
    with torch.inference_mode():
        here: torch.Tensor = model(push_probe.probe_ids(model.config)).logits.float()
    there = load_file(file)["logits"].float()
    largest = float((here - there).abs().max())
    if largest <= TOLERANCE[model.dtype] * max(1.0, float(here.abs().max())):
        return []
    return [f"logits: differ by {largest:.2g} from those of {parcel.source} opened here"]


def _told(found: dict[str, Any], remote: bool, kind: str) -> Findings:
    code = "with the code beside it" if remote else "without remote code"
    seen = [
        f"opens {code}: {', '.join(found['classes'])}",
        "logits equal" if kind == "causal-lm" else "scores equal",
        *(["tied weights tied"] if found["wants_tied"] else []),
        f"one end of turn: {found['eos_token']} ({found['eos']['tokenizer']})",
    ]
    remarks = []
    if "reply" in found:
        tokens, ended = found["reply"]["tokens"], found["reply"]["ended"]
        if ended:
            seen.append(f'a reply to "Hello." ends after {tokens:,} tokens')
        else:
            remarks.append(f'a reply to "Hello." has not ended after {tokens:,} tokens')
    return Findings(seen, remarks)


def _probe(request: dict[str, Any], parcel: Parcel) -> dict[str, Any]:
    """What push_probe.py finds, in a Python of its own: no caches, no tokens, no network."""
    with tempfile.TemporaryDirectory() as home:
        kept = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE"):
            kept.pop(name, None)
        # As a stranger's: empty caches. On the CPU, as it is opened here.
        settings = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-I", str(push_probe.__file__), json.dumps(request)],
            env=kept | settings, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise TrueupError(
            f"{parcel.source}: does not open where trueup is not installed: {reason.strip()}\n"
            "(the last line of a clean process; nothing went up)"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
