"""Tiny models with records, as stages would have left them, and recipes that compare them."""

import json
from pathlib import Path
from typing import Any

import eval_models

from trueup.app.runner import run_stage
from trueup.base.data import DataArguments, data_fingerprint
from trueup.recipes.directory import RECORD, identity, open_directory, write_json
from trueup.recipes.reader import read_recipe

Record = dict[str, Any]


def write_model(path: Path, stage: str, seed: int = 0, kind: str = "policy", **record: Any) -> Path:
    """A model directory with a record.

    Args:
        record: parents (role -> directory), recipe, data, metrics.
    """
    makers = {"policy": eval_models.policy, "reward": eval_models.reward_model}
    makers[kind](seed=seed, max_position_embeddings=512).save_pretrained(path)
    eval_models.tokenizer().save_pretrained(path)
    parents = {role: open_directory(one).lineage for role, one in record.pop("parents", {}).items()}
    content = {"stage": stage, "identity": identity(path), "parents": parents, "recipe": {}, "data": []}
    write_json(path / RECORD, content | record)
    return path


def write_prompts(folder: Path) -> Path:
    """A set of prompts with splits of its own."""
    folder.mkdir()
    for split, count in {"train": 6, "validation": 5, "test": 12}.items():
        rows = [{"prompt": f"{split} {number} asks <b>what?</b>"} for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def fingerprint(prompts: Path, split: str) -> Record:
    """What a record says of a split that was read."""
    return data_fingerprint(DataArguments(dataset_name=str(prompts)), split)  # type: ignore[arg-type]


class World:
    """An SFT model, pairs, a reward model, and two arms that learned from them alike."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompts = write_prompts(folder / "prompts")
        self.sft = write_model(folder / "sft", "sft")
        self.pairs = folder / "pairs"
        self.pairs.mkdir()
        (self.pairs / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        read = [fingerprint(self.prompts, "train")]
        write_json(
            self.pairs / RECORD,
            {"stage": "pairs", "identity": identity(self.pairs), "parents": {}, "data": read},
        )
        self.reward = write_model(
            folder / "reward", "reward", kind="reward", parents={"dataset_name": self.pairs}
        )
        self.read = [fingerprint(self.prompts, split) for split in ("train", "validation")]

    def dpo(self, name: str = "dpo", seed: int = 1, **changes: Any) -> str:
        parents = {"model_name_or_path": self.sft, "dataset_name": self.pairs} | changes.pop("parents", {})
        return str(write_model(self.folder / name, "dpo", seed, parents=parents, **changes))

    def ppo(self, name: str = "ppo", seed: int = 2, **changes: Any) -> str:
        parents = {"model_name_or_path": self.sft, "reward_model_name_or_path": self.reward}
        parents |= changes.pop("parents", {})
        usual = {"data": self.read} | changes
        return str(write_model(self.folder / name, "ppo", seed, parents=parents, **usual))

    def compare(self, arms: Record, name: str = "compare", **keys: Any) -> Path:
        """Run a comparison; its folder."""
        values = {
            "stage": "compare",
            "output_dir": str(self.folder / "out" / name),
            "baseline": str(self.sft),
            "arms": arms,
            "scorers": ["length"],
            "dataset_name": str(self.prompts),
            "max_new_tokens": 8,
            "use_cpu": True,
        } | keys
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(values))
        return run_stage(read_recipe(path)).output_dir


def verdict(folder: Path) -> Record:
    """What a comparison found."""
    found: Record = json.loads((folder / "verdict.json").read_text())
    return found
