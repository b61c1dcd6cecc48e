"""What a comparison says of one model, for its card; and the KL-reward trace of a model that was in none."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.app.card_public import public
from trueup.app.card_subject import hub_type
from trueup.recipes.directory import RECORD, VERDICT, ModelDirectory, is_comparison, read_json
from trueup.recipes.errors import UsageError

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Json = dict[str, Any]

BASELINE = "baseline"
MANIFEST = "manifest.json"
PROXY = "reward_model_name_or_path"  # the key of a comparison's recipe


@dataclass(frozen=True)
class Comparison:
    """A comparison in which a model was an arm, or chose the answers of one.

    Args:
        verdict, manifest: as they may be shown.
        arms: the model's own; of a reward model the best-of-n ones it chose for.
        seeds: models of the arm; the card's is one of them.
    """

    folder: Path
    verdict: Json
    manifest: Json
    arms: tuple[str, ...]
    seeds: int

    @property
    def pairs(self) -> list[Json]:
        """The outcomes of its arms, those against the baseline first."""
        mine = [pair for pair in self.verdict["pairs"] if {pair["a"], pair["b"]} & set(self.arms)]
        return sorted(mine, key=lambda pair: BASELINE not in (pair["a"], pair["b"]))

    @property
    def prompts(self) -> Json:
        """The fingerprint of the prompts."""
        return dict(next(iter(self.manifest.get("data", [])), {"name": "prompts", "split": "test"}))

    @property
    def others(self) -> dict[str, str]:
        """Arm -> what it is, of the other arms that are models."""
        found = {}
        for arm in self.verdict["arms"]:
            if arm["name"] not in self.arms:
                models = [f"{Path(one['path']).name} {one['identity'][:12]}" for one in arm["models"]]
                chosen = f", the best of {arm['best_of']} by the reward model" if arm["best_of"] else ""
                found[arm["name"]] = ", ".join(models) + chosen
        return found

    def results(self) -> Iterator["EvalResult"]:
        """Its win rates for the model index, each with its interval in its name."""
        from huggingface_hub import EvalResult

        scorer = self.verdict["scorers"][0]
        for pair in self.pairs:
            rate, other = pair["rate"], pair["b"]
            if pair["b"] in self.arms:
                rate = {"estimate": 1 - rate["estimate"], "low": 1 - rate["high"], "high": 1 - rate["low"]}
                other = pair["a"]
            if pair["a"] in self.arms and pair["b"] in self.arms:
                continue
            yield EvalResult(
                task_type="text-generation", task_name="Text generation",
                dataset_type=hub_type(self.prompts), dataset_name=self.prompts["name"],
                dataset_split=self.prompts["split"], metric_type="win_rate", metric_value=rate["estimate"],
                metric_name=f"win rate over {other} by {scorer}, ties half, "
                f"95 % interval {rate['low']:.4f} to {rate['high']:.4f}",
            )  # fmt: skip


def find_comparison(model: ModelDirectory, folder: Path | None = None) -> Comparison | None:
    """The comparison that was named, or the newest beside the model in which it takes part.

    Raises:
        UsageError: the folder named is no comparison, or has nothing on this model.
    """
    if folder is not None:
        if not is_comparison(folder):
            raise UsageError(f"--comparison {folder}: not a comparison: {VERDICT} is missing")
        if (found := _read(folder, model)) is None:
            raise UsageError(
                f"--comparison {folder}: {model.path} ({model.identity[:12]}) is none of its arms"
            )
        return found
    beside = [path.parent for path in model.path.absolute().parent.glob(f"*/{VERDICT}")]
    known = [found for path in beside if _is_published(path) and (found := _read(path, model)) is not None]
    return max(known, key=lambda one: str(_record(one.folder).get("started", "")), default=None)


def _is_published(path: Path) -> bool:
    return not path.name.startswith(".") and not path.name.endswith((".previous", ".work", ".runs"))


def _record(folder: Path) -> Json:
    found: Json = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    return found


def _read(folder: Path, model: ModelDirectory) -> Comparison | None:
    verdict = read_json(folder / VERDICT)
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    arms = verdict.get("arms", [])
    mine = [
        arm for arm in arms if not arm["best_of"] and model.identity in [m["identity"] for m in arm["models"]]
    ]
    models = manifest.get("models", {}).items()
    proxies = [one["identity"] for role, one in models if role.partition("[")[0] == PROXY]
    if model.identity in proxies:
        mine = [arm for arm in arms if arm["best_of"]]
    if not mine:
        return None
    root = folder.absolute().parent
    names = tuple(arm["name"] for arm in mine)
    return Comparison(folder, public(verdict, root), public(manifest, root), names, len(mine[0]["models"]))


# ----------------------------------------------------------------------------------------- of a run by itself


def own_frontier(model: ModelDirectory) -> bytes | None:
    """Score against the root of the KL along a run's own validations, as a PNG; None where it left none."""
    path = model.path / "frontier.jsonl"
    if not path.exists():
        return None
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    points = [point for point in lines if point["split"] == "validation" and point["kl"] is not None]
    series = {
        label: [
            (max(point["kl"], 0.0) ** 0.5, point[name]) for point in points if point.get(name) is not None
        ]
        for name, label in (("score", "what judges"), ("reward", "the reward model"))
    }
    known = {label: line for label, line in series.items() if line}
    return _draw(known) if known else None


def _draw(series: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(4.5 * len(series), 3.6), layout="constrained")
    panels = figure.subplots(1, len(series), squeeze=False).flat
    for axes, (label, line) in zip(panels, series.items(), strict=True):
        axes.plot(*zip(*line, strict=True), "o-", color="#0072B2", ms=4)
        axes.set(title=label, xlabel="√KL from where it began, √nats", ylabel="mean score")
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
