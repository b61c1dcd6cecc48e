"""What a PPO run leaves to look at: `frontier.jsonl` and a picture."""

from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from trueup.eval.frontier import FrontierCallback, frontier

PICTURE = "ppo.png"


class TraceCallback(FrontierCallback):
    """Keeps `frontier.jsonl` up to date, and draws the picture when training ends."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            draw(state.log_history, self.folder / PICTURE)


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
