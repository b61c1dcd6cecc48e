"""`trueup bench ppo --learning`: TRL 1.12's trainer and ours learn the same, over several seeds.

The same tiny policy, the same reward model, episodes and hyper-parameters. What PPO maximises is compared:
the score less `kl_coef` times the KL, at the end of training.
"""

import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from trueup.app.bench_ppo import Contestant, Shape, started, write_models

CONTESTANTS = (
    Contestant("trueup", "trueup"),
    Contestant("trueup, shared trunk", "trueup", share_trunk=True),
    Contestant("trl 1.12", "trl"),
)
SHAPE = Shape(width=64, layers=2, vocab=279, mean_length=12)
ROUNDS, ROWS, LAST = 40, 64, 5
# TRL 1.12 clips no gradient, whatever max_grad_norm says; so neither does ours here.
SETTINGS = {
    "per_device_train_batch_size": ROWS, "num_ppo_epochs": 4, "num_mini_batches": 1,
    "total_episodes": ROUNDS * ROWS, "response_length": 24, "temperature": 1.0, "missing_eos_penalty": 1.0,
    "learning_rate": 2e-3, "adam_epsilon": 1e-5, "max_grad_norm": 0.0, "kl_coef": 0.05,
    "vf_coef": 0.1, "lam": 0.95,
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    "seed": 0,
}  # fmt: skip
# A head that begins at 0, on features that only the policy has shaped, has to learn faster and weigh more.
SHARED_TRUNK = {"value_learning_rate": 2e-2, "vf_coef": 2.0}
CURVES = {
    "score": "reward model's score",
    "kl": "KL, nats per completion",
    "objective": "score - kl_coef * KL",
}


@dataclass(frozen=True)
class Curve:
    """One run: a number for each round."""

    score: list[float]  # with what a missing eos costs
    kl: list[float]
    objective: list[float]

    @classmethod
    def of(cls, history: list[dict[str, float]]) -> "Curve":
        """From a log; both trainers have the same names."""
        lines = [line for line in history if "objective/kl" in line]
        objective = [line["objective/rlhf_reward"] for line in lines]
        penalty = [line["objective/non_score_reward"] for line in lines]
        score = [total - kl for total, kl in zip(objective, penalty, strict=True)]
        return cls(score, [line["objective/kl"] for line in lines], objective)


def learning(environment: Path, seeds: int, picture: Path) -> tuple[dict[str, Any], Table]:
    """Train all contestants with each seed, and draw their curves; returns the figures."""
    curves: dict[str, list[Curve]] = {one.name: [] for one in CONTESTANTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = write_models(folder, SHAPE)
        teach(models)
        for one in CONTESTANTS:
            settings = one.settings({"output_dir": str(folder / "out"), **SETTINGS})
            settings |= SHARED_TRUNK if one.share_trunk else {}
            spec = {**models, "settings": settings, "paced": False, "seeds": list(range(seeds))}
            with started(one, spec, environment, folder) as process:
                for _ in track(range(seeds), one.name, console=Console(stderr=True)):
                    curves[one.name].append(Curve.of(process.answer()))
    draw(curves, picture)
    return _verdict(curves, seeds)


def teach(models: dict[str, Any]) -> None:
    """Give the reward model something to reward: every second byte, on average over the tokens.

    One head of its first layer attends to all places alike and carries the marks of their tokens to where the
    score is read. Scores of the policy's own completions come to vary by 1: in the head, for TRL reads that
    and not the model's forward, so that no calibration in the config would count.
    """
    import torch
    from transformers import AutoTokenizer

    from trueup.base import GPTForCausalLM, GPTForSequenceClassification
    from trueup.eval.sampler import SamplingSettings, sample

    policy = GPTForCausalLM.from_pretrained(models["policy"])
    tokenizer = AutoTokenizer.from_pretrained(models["policy"])
    found = sample(policy, tokenizer, models["prompts"], SamplingSettings(max_new_tokens=24))
    reward = GPTForSequenceClassification.from_pretrained(models["reward"])
    embedding, attention = reward.model.embed_tokens.weight, reward.model.layers[0].attention
    asked = sorted({token for one in found for token in one.prompt_ids})
    mark, carried = 1, 2  # channels of the residual stream
    with torch.no_grad():
        marks = torch.ones(len(embedding)) * embedding.std()
        marks[::2] *= -1
        marks[asked] = 0
        embedding[:, mark] = marks
        for layer in reward.model.layers:
            layer.attention.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        attention.qkv_proj.weight.zero_()
        first_value = 2 * attention.o_proj.in_features  # behind all queries and keys
        attention.qkv_proj.weight[first_value, mark] = 1
        attention.o_proj.weight[carried, 0] = 1
        reward.score.weight.zero_()
        reward.score.weight[0, carried] = 1
        scores = [reward(torch.tensor([one.prompt_ids + one.ids])).logits[0, 0].item() for one in found]
        reward.score.weight /= statistics.stdev(scores)
    reward.save_pretrained(models["reward"])


def _verdict(curves: dict[str, list[Curve]], seeds: int) -> tuple[dict[str, Any], Table]:
    """Means over seeds of the last rounds with their standard errors, and whether ours is no worse."""
    title = f"ppo: {ROUNDS} rounds of {ROWS}, the last {LAST}, {seeds} seeds"
    table = Table("", *CURVES, title=title)
    finals: dict[str, dict[str, list[float]]] = {}
    for name, runs in curves.items():
        finals[name] = {
            curve: [statistics.fmean(getattr(run, curve)[-LAST:]) for run in runs] for curve in CURVES
        }
        table.add_row(name, *(f"{statistics.fmean(x):.3f} ± {_stderr(x):.3f}" for x in finals[name].values()))
    peer = finals["trl 1.12"]["objective"]
    no_worse = {}
    for name in (name for name in finals if name != "trl 1.12"):
        ours = finals[name]["objective"]
        difference = statistics.fmean(ours) - statistics.fmean(peer)
        no_worse[name] = difference > -2 * math.hypot(_stderr(ours), _stderr(peer))
        table.add_row(f"{name} - trl 1.12", "", "", f"{difference:+.3f}")
    means = {name: {k: statistics.fmean(x) for k, x in found.items()} for name, found in finals.items()}
    return {"benchmark": "ppo learning", "seeds": seeds, "final": means, "no_worse": no_worse}, table


def _stderr(numbers: list[float]) -> float:
    return statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Each run as a thin line, the mean over seeds as a thick one."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (curve, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for place, (name, runs) in enumerate(curves.items()):
            lines = [getattr(run, curve) for run in runs]
            for line in lines:
                axes.plot(line, color=f"C{place}", lw=0.5, alpha=0.4)
            axes.plot([statistics.fmean(x) for x in zip(*lines, strict=True)], color=f"C{place}", label=name)
        axes.set(title=title, xlabel=f"round of {ROWS} completions")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
