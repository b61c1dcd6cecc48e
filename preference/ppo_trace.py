"""What a PPO run leaves to look at: `frontier.jsonl`, a picture, and the completions of each evaluation."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FRONTIER = "frontier.jsonl"
PICTURE = "ppo.png"


def frontier(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The KL-reward trace: for each logged line its KL (nats per completion) and rewards.

    Args:
        history: Trainer's `log_history`.

    Returns:
        Points {"step", "split": "train" | "validation", "kl", "reward", ...}, in their order.
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
        elif "eval_kl" in line:
            names = [n for n in line if n in ("eval_kl", "eval_kl_stderr", "eval_reward", "eval_score")]
            names += [name for name in line if name.startswith("eval_scorers/")]
            known = {name.removeprefix("eval_"): line[name] for name in names}
            points.append({"step": line["step"], "split": "validation", **known})
    return points


class TraceCallback(TrainerCallback):
    """Keeps `frontier.jsonl` up to date, and draws the picture when training ends.

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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            draw(state.log_history, self.folder / PICTURE)

    def _write(self, state: TrainerState, lines: list[dict[str, Any]], mode: str) -> None:
        points = frontier(lines)
        if state.is_world_process_zero and (points or mode == "w"):
            with (self.folder / FRONTIER).open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(point) + "\n" for point in points)


# (title, unit of the y axis, curves as (label, name in the log)) of each panel but the first
PANELS = (
    ("KL from the reference", "nats per completion", (("rollouts", "objective/kl"), ("held out", "eval_kl"))),
    ("Reward", "", (("rollouts", "objective/scores"), ("held out", "eval_reward"), ("scorer", "eval_score"))),
    (
        "Length",
        "tokens",
        (("rollouts", "completions/mean_length"), ("held out", "eval_completions/mean_length")),
    ),
    ("Updates", "", (("approximate KL", "policy/approxkl_avg"), ("clipped share", "policy/clipfrac_avg"))),
    ("Value model", "explained variance", (("rollouts", "val/explained_variance"),)),
)


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """The run in six panels, as a PNG: reward against the root of the KL, and what else tells how it went."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(13, 7), layout="constrained")
    first, *others = figure.subplots(2, 3).flat
    points = frontier(history)
    for split, style in (("train", "."), ("validation", "o-")):
        for name in ("reward", "score"):
            known = [p for p in points if p["split"] == split and name in p]
            if not known:
                continue
            roots = [max(p["kl"], 0.0) ** 0.5 for p in known]
            first.plot(roots, [p[name] for p in known], style, ms=4, lw=1, label=f"{name}, {split}")
    first.set(title="Reward against KL", xlabel="√KL")
    if points:
        first.legend(fontsize="small")
    for axes, (title, unit, curves) in zip(others, PANELS, strict=True):
        for label, name in curves:
            lines = [line for line in history if name in line]
            if not lines:
                continue
            marker = "o-" if name.startswith("eval_") else "-"
            axes.plot([x["step"] for x in lines], [x[name] for x in lines], marker, ms=3, lw=1, label=label)
        axes.set(title=title, xlabel="round", ylabel=unit)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def save_table(table: list[dict[str, Any]], folder: Path, step: int, show: bool) -> None:
    """The completions of an evaluation as `completions/step-N.jsonl`; `show` prints the first few."""
    path = folder / "completions" / f"step-{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in table), encoding="utf-8")
    if show:
        from rich.console import Console
        from rich.table import Table

        shown = Table("prompt", "completion", "reward", title=f"round {step}", show_lines=True)
        for entry in table[:5]:
            shown.add_row(str(entry["prompt"])[-300:], entry["completion"], f"{entry['reward']:.3f}")
        Console().print(shown, markup=False)
