"""The KL-reward trace of a run, `frontier.jsonl`: one format for all arms, so that they can be compared."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FRONTIER = "frontier.jsonl"


def frontier(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each logged line that has a KL (nats per completion), that and the rewards beside it.

    Args:
        history: Trainer's `log_history`.

    Returns:
        Points {"step", "split": "train" | "validation", "kl", "reward" | "score", ...}, in their order. Those
        of training are PPO's rollouts; the others come from `Validation`.
    """
    points = []
    for line in history:
        if "objective/kl" in line:
            known = {
                "kl": line["objective/kl"],
                "reward": line["objective/scores"],
                "episode": line["episode"],
            }
            points.append({"step": line["step"], "split": "train", **known})
        elif "eval_kl_stderr" in line:  # some trainers of TRL log an `eval_kl` of their own
            scorers = sorted(name for name in line if name.startswith("eval_scorers/"))
            names = [
                n for n in ("eval_kl", "eval_kl_stderr", "eval_reward", "eval_score", *scorers) if n in line
            ]
            known = {name.removeprefix("eval_"): line[name] for name in names}
            points.append({"step": line["step"], "split": "validation", **known})
    return points


class FrontierCallback(TrainerCallback):
    """Keeps `frontier.jsonl` in a folder up to date.

    The file follows from the log, which a checkpoint brings along: a resume writes no point twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state, state.log_history, "w")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state, state.log_history[-1:], "a")

    def _write(self, state: TrainerState, lines: list[dict[str, Any]], mode: str) -> None:
        points = frontier(lines)
        if state.is_world_process_zero and (points or mode == "w"):
            with (self.folder / FRONTIER).open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(point) + "\n" for point in points)
