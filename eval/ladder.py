"""The stage ladder: from base model to aligned ones, each step's figures side by side, and what they cost.

It reads what runs leave and measures nothing: `trueup.json` (time, tokens, figures of the last validation),
`eval/*.json` (lm-eval), and the `verdict.json` of comparisons. What nobody has measured is a dash, with the
command that measures it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trueup.eval.ladder_runs import RunGroup, run_groups
from trueup.eval.results import lm_eval_results
from trueup.recipes.directory import RECORD, VERDICT, ModelDirectory, read_json, short_names
from trueup.recipes.errors import UsageError

Json = dict[str, Any]

MODELS = ("pretrain", "sft", "dpo", "kto", "ppo", "rloo", "grpo")  # stages whose output is on the ladder
BEST_OF = "best of n"
MANIFEST, SWEEP = "manifest.json", "sweep.json"  # of a comparison, of a versus
BITS, WIN, KL, LENGTH, REPETITION = (
    "bits per byte",
    "win rate, %",
    "KL, nats",
    "length, tokens",
    "repetition, %",
)
TIME, TOKENS, COST = "time", "tokens trained", "cost"

# Where a figure comes from, by the mark beside it.
SOURCES = {
    "": "lm-eval, or the newest comparison on test prompts",
    "c": "text of the comparison",
    "t": "held-out text, as it was trained",
    "v": "validation prompts, as it was trained",
}
# How to get what is missing.
ADVICE = {
    BITS: "trueup eval DIR --tasks TEXT (lab_text in the lab), or text_dataset_name in a comparison",
    "lm-eval": "trueup eval DIR --tasks TASKS",
    WIN: "trueup compare, with the model as an arm",
    KL: "trueup compare, with the model as an arm",
    LENGTH: "trueup compare, with the model as an arm",
    REPETITION: "trueup compare, with the model as an arm",
    COST: "--price PER_HOUR",
}


@dataclass(frozen=True)
class Cell:
    """One figure.

    Args:
        reach: half of its 95 % interval; None where that is not known.
        source: one of SOURCES.
        even: not to be told from the model it began as; of a win rate, from 50 %.
        bound: the figure is at most this.
    """

    value: float
    reach: float | None = None
    source: str = ""
    even: bool = False
    bound: bool = False


@dataclass
class Step:
    """A model on the ladder: one directory, the seeds of one method, or best-of-n.

    Args:
        began_as: identity of the model it was trained from.
    """

    name: str
    stage: str
    identities: list[str]
    began_as: str
    seconds: float
    tokens: int
    cells: dict[str, Cell] = field(default_factory=dict)

    def may_have(self, figure: str) -> bool:
        """Whether a figure can be had: a base model does not answer, and best-of-n is no model."""
        if figure == WIN:
            return self.stage not in ("pretrain", "sft")
        if figure in (KL, LENGTH, REPETITION):
            return self.stage != "pretrain"
        return self.stage != BEST_OF


@dataclass(frozen=True)
class Ladder:
    """Steps in the order of their making; what else was run; the price that costs follow from; pretraining
    runs that can be held against each other."""

    steps: list[Step]
    besides: dict[str, tuple[float, int]]  # name -> seconds, tokens
    price: float | None
    notes: list[str]
    groups: list[RunGroup]

    @property
    def climbs(self) -> bool:
        """Whether it is one: runs beside each other alone are no ladder."""
        return len(self.steps) != sum(len(group.runs) for group in self.groups)

    @property
    def figures(self) -> list[str]:
        """Every figure that any step has, and those that any ladder should have."""
        found = dict.fromkeys(name for step in self.steps for name in step.cells)
        tasks = [name for name in found if name not in ADVICE]
        return [BITS, *tasks, *([] if tasks else ["lm-eval"]), WIN, KL, LENGTH, REPETITION]

    @property
    def seconds(self) -> float:
        """Of all runs."""
        return sum(step.seconds for step in self.steps) + sum(time for time, _ in self.besides.values())

    @property
    def tokens(self) -> int:
        """Of all runs."""
        return sum(step.tokens for step in self.steps) + sum(count for _, count in self.besides.values())

    def cost(self, seconds: float) -> float | None:
        """At the stated price per hour."""
        return None if self.price is None else self.price * seconds / 3600

    def missing(self) -> dict[str, str]:
        """Figure -> how to get it, of those that some step lacks."""
        lacking = [
            name
            for name in self.figures
            if any(name not in step.cells and step.may_have(name) for step in self.steps)
        ]
        found = {name: ADVICE.get(name, ADVICE["lm-eval"]) for name in lacking}
        return found | ({COST: ADVICE[COST]} if self.price is None else {})

    def as_dict(self) -> Json:
        """JSON-able."""
        return asdict(self) | {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "cost": self.cost(self.seconds),
        }


# ------------------------------------------------------------------------------------------------ reading


def runs_below(folder: Path) -> list[Path]:
    """Every directory that a run published in a folder, and none of their work.

    Raises:
        UsageError: there is none.
    """
    found = [
        path.parent
        for path in sorted(folder.rglob(RECORD))
        if not any(part.endswith((".previous", ".work", ".runs")) or part.startswith(".")
                   for part in path.relative_to(folder).parts)
    ]  # fmt: skip
    if not found:
        raise UsageError(f"{folder}: holds no finished run (a directory with {RECORD})")
    return found


def ladder(directories: Iterable[Path], price: float | None = None) -> Ladder:
    """The ladder of some runs.

    Args:
        directories: with a record each.
        price: of an hour, in any currency.
    """
    runs = [ModelDirectory(path, record["identity"], record) for path, record in _records(directories)]
    runs.sort(key=lambda run: (_depth(run.lineage), run.record["started"]))
    verdicts = [run for run in runs if (run.path / VERDICT).exists()]
    verdicts.sort(key=lambda run: run.record["started"])
    short = short_names([run.path for run in runs])
    names = [short[run.path] for run in runs]
    steps = [_step(run, name) for run, name in zip(runs, names, strict=True) if run.record["stage"] in MODELS]
    besides = {
        name if run.record["stage"] in name else f"{run.record['stage']} {name}": (
            run.record["seconds"],
            run.record["tokens"],
        )
        for run, name in zip(runs, names, strict=True)
        if run.record["stage"] not in MODELS and not (run.path / SWEEP).exists()  # whose time is its runs'
    }
    notes: list[str] = []
    for run in verdicts:  # the newest has the last word
        verdict = read_json(run.path / VERDICT)
        steps = _with_arms(steps, verdict, run.path, besides)
        notes += [f"{run.path}: {note}" for note in [*verdict["void"].values(), *verdict["unequal"]]]
    _choose_bits(steps)
    _mark_noise(steps)
    return Ladder(steps, besides, price, list(dict.fromkeys(notes)), run_groups(runs))


def _records(directories: Iterable[Path]) -> Iterator[tuple[Path, Json]]:
    for path in directories:
        yield path, read_json(path / RECORD)


def _depth(lineage: Mapping[str, Any]) -> int:
    return 1 + max((_depth(parent) for parent in lineage["parents"].values()), default=0)


def _step(run: ModelDirectory, name: str) -> Step:
    record = run.record
    start = record["parents"].get("model_name_or_path", {}).get("identity", "")
    step = Step(name, record["stage"], [run.identity], start, record["seconds"], record["tokens"])
    metrics = record["metrics"]
    if "bits_per_byte" in metrics:
        step.cells[BITS] = Cell(metrics["bits_per_byte"], source="t")
    if "eval_kl" in metrics:
        stderr = metrics.get("eval_kl_stderr")
        step.cells[KL] = Cell(metrics["eval_kl"], None if stderr is None else 1.96 * stderr, "v")
    for figure, name, factor in (
        (LENGTH, "eval_completions/mean_length", 1),
        (REPETITION, "eval_repetition", 100),
    ):
        if name in metrics:
            step.cells[figure] = Cell(factor * metrics[name], source="v")
    for name, found in lm_eval_results(run).items():
        error = found["stderr"]
        step.cells[name] = Cell(found["value"] or 0.0, None if error is None else 1.96 * error)
    return step


# ------------------------------------------------------------------------------------------------ comparisons


def _with_arms(
    steps: list[Step], verdict: Json, path: Path, besides: dict[str, tuple[float, int]]
) -> list[Step]:
    """The steps, with what a comparison says of them; the seeds of an arm become one step."""
    sweep = read_json(path / SWEEP)["runs"] if (path / SWEEP).exists() else []
    if tried := [one for one in sweep if one["tried"]]:
        besides[f"settings tried ({len(tried)} runs)"] = (
            sum(one["seconds"] for one in tried), sum(one["tokens"] for one in tried)
        )  # fmt: skip
    models = {one["identity"]: one for one in read_json(path / MANIFEST)["models"].values()}
    pairs = {pair["a"]: pair for pair in verdict["pairs"] if pair["b"] == "baseline"}
    for arm in verdict["arms"]:
        identities = [one["identity"] for one in arm["models"]]
        mine = [step for step in steps if set(step.identities) & set(identities)]
        if arm["best_of"]:
            mine = [step for step in steps if step.name == arm["name"]]
            step = Step(arm["name"], BEST_OF, [], identities[0], 0.0, 0)
        elif len(mine) == len(identities) == 1:
            step = mine[0]
        else:
            step = _arm([models[one] for one in identities], arm["name"])
        steps = [one for one in steps if one not in mine] + [step]
        _read_arm(step, arm, pairs.get(arm["name"]), verdict["tax"].get(arm["name"], []))
    order = {name: place for place, name in enumerate([*MODELS, BEST_OF])}
    return sorted(steps, key=lambda step: order.get(step.stage, len(order)))


def _arm(models: Sequence[Json], name: str) -> Step:
    """The seeds of one method as one step; or a model that lies elsewhere."""
    first = models[0]
    if len(models) > 1:
        name = f"{name} ({len(models)} seeds)"
    elif name == "baseline":
        name = Path(first["path"]).name
    start = next((one["identity"] for one in first["lineage"] if one["role"] == "model_name_or_path"), "")
    seconds = sum(one["seconds"] or 0.0 for one in models)
    tokens = sum(one["tokens_trained"] or 0 for one in models)
    return Step(name, first["stage"], [one["identity"] for one in models], start, seconds, tokens)


def _read_arm(step: Step, arm: Json, pair: Json | None, taxes: Sequence[Json]) -> None:
    if pair is not None:
        rate = pair["rate"]
        even = rate["low"] <= 0.5 <= rate["high"]
        step.cells[WIN] = Cell(100 * rate["estimate"], 50 * (rate["high"] - rate["low"]), even=even)
    if arm["kl"]["per_sequence"] is not None:
        kl = arm["kl"]
        reach = (kl["high"] - kl["low"]) / 2 if "high" in kl else None
        even = reach is not None and 0 < reach >= kl["per_sequence"]
        step.cells[KL] = Cell(kl["per_sequence"], reach, even=even, bound=kl["bound"])
    tokens = arm["means"]["tokens"]
    moved = arm["differences"].get("tokens")
    even = moved is not None and moved["low"] <= 0 <= moved["high"]
    step.cells[LENGTH] = Cell(tokens["estimate"], (tokens["high"] - tokens["low"]) / 2, even=even)
    step.cells[REPETITION] = Cell(100 * arm["text"]["repetition"])
    bits = [one["bits_per_byte"] for one in taxes if "bits_per_byte" in one]
    if bits:
        step.cells[BITS] = Cell(sum(bits) / len(bits), source="c")
    if len(step.identities) > 1:
        step.cells |= _mean_of_seeds([one["lm_eval"] for one in taxes])


def _mean_of_seeds(results: Sequence[Mapping[str, Json]]) -> dict[str, Cell]:
    """lm-eval's figures of an arm's seeds, as far as all have them; documents are shared, so errors do not
    shrink."""
    shared = [name for name in results[0] if all(name in one for one in results)] if results else []
    found = {}
    for name in shared:
        errors = [one[name]["stderr"] for one in results]
        mean = sum(one[name]["value"] for one in results) / len(results)
        found[name] = Cell(mean, None if None in errors else 1.96 * sum(errors) / len(errors))
    return found


def _choose_bits(steps: Sequence[Step]) -> None:
    """By lm-eval where it measured them: of one text, asked in one way, or the line would compare texts."""
    names = Counter(name for step in steps for name in step.cells if "bits_per_byte" in name.split()[1:2])
    for text, _ in names.most_common(1):
        for step in steps:
            if text in step.cells:
                step.cells[BITS] = step.cells[text]


def _mark_noise(steps: Sequence[Step]) -> None:
    """lm-eval's figures that the standard errors do not tell from those of the model a step began as."""
    by_identity = {identity: step for step in steps for identity in step.identities}
    for step in steps:
        before = by_identity[step.began_as].cells if step.began_as in by_identity else {}
        for name, cell in step.cells.items():
            other = before.get(name)
            if name in (WIN, KL, LENGTH, REPETITION) or other is None:
                continue
            if cell.reach is not None and other.reach is not None:
                within = abs(cell.value - other.value) <= math.hypot(cell.reach, other.reach)
                step.cells[name] = Cell(cell.value, cell.reach, cell.source, within)
