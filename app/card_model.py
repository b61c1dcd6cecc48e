"""The card of a model: what its directory, its lineage and a comparison record of it, as a page of Markdown.

Nothing is measured here and nothing made up: what the records do not hold, the page says is missing.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trueup.app.card_comparison import Comparison, find_comparison, own_frontier
from trueup.app.card_lineage import DATA, REWARD, START
from trueup.app.card_load import adapter_lines, load_lines
from trueup.app.card_public import public
from trueup.app.card_subject import Files, Subject, making, public_family
from trueup.eval.markdown import code, environment
from trueup.eval.results import figures
from trueup.recipes.directory import RECORD, ModelDirectory, identity, open_directory, read_json

Json = dict[str, Any]

TEMPLATE = "card.md.jinja"
WIN_RATES, FRONTIER = "card/win_rates.png", "card/frontier.png"
EXAM, LOSS = "eval/exam.png", "loss.png"  # where the stages put them
METHODS = {"dpo": "DPO", "kto": "KTO", "ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO"}
# What of a run's last evaluation is said first; the rest stands behind it.
HEADLINES = {
    "bits_per_byte": "bits per byte of held-out text",
    "floor": "its entropy, bits per byte: no model can have less",
    "eval_loss": "loss on the validation split",
    "eval_accuracy": "accuracy on the validation pairs",
    "eval_rewards/accuracies": "validation pairs whose chosen answer gained on the rejected one",
    "eval_score": "mean score of answers to validation prompts",
    "eval_reward": "mean score by the reward model, same answers",
    "eval_kl": "KL from the model it began as, nats per answer",
}
_FEW = 0.9  # of the cases in which a worse reply must score less; below it the card warns


@dataclass(frozen=True)
class ModelSubject(Subject):
    """A model, or an adapter.

    Args:
        config: of the model; of an adapter, PEFT's.
        comparison: one that it took part in.
    """

    config: Json
    comparison: Comparison | None

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter alone."""
        return "peft_type" in self.config

    @property
    def uses_lora(self) -> bool:
        """Whether its run trained an adapter."""
        return bool(self.record.get("recipe", {}).get("use_peft"))

    @property
    def has_adapter(self) -> bool:
        """Whether that adapter lies beside the merged model."""
        return (self.model.path / "adapter" / "adapter_config.json").exists()

    @cached_property
    def kind(self) -> str:
        """What it does: `reward`, `chat`, or `base`, which goes on with a text."""
        architecture = str((self.config.get("architectures") or [""])[0])
        if architecture.endswith("ForSequenceClassification") or self.config.get("task_type") == "SEQ_CLS":
            return "reward"
        plain = self.stage == "pretrain" or self.record.get("recipe", {}).get("dataset_form") == "text"
        merged = self.model.path.absolute().parent if self.is_adapter else self.model.path
        return "chat" if has_template(merged) and not plain else "base"

    @cached_property
    def parameters(self) -> int:
        """Numbers in its weights; tied matrices are stored and counted once."""
        from safetensors import safe_open

        count = 0
        for path in sorted(self.model.path.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
                count += sum(math.prod(shape) for shape in shapes)
        return count


def has_template(path: Path) -> bool:
    """Whether conversations can be written for the model."""
    settings = path / "tokenizer_config.json"
    return (path / "chat_template.jinja").exists() or (
        settings.exists() and "chat_template" in read_json(settings)
    )


def open_subject(
    path: Path,
    repo_id: str | None,
    license: str | None,
    comparison: Path | None,
) -> ModelSubject:
    """The model of a directory, or the adapter.

    Raises:
        UsageError: no such directory; or the comparison is none, or not of this model.
        TrueupError: it is damaged, or was changed after it was written.
    """
    if is_adapter(path):
        trained = path.absolute().parent / RECORD
        record = read_json(trained) if path.absolute().name == "adapter" and trained.exists() else {}
        model = ModelDirectory(path, identity(path), record)
        config = read_json(path / "adapter_config.json")
    else:
        model = open_directory(path)
        config = read_json(path / "config.json")
    shown, nodes = public_family(model)
    found = find_comparison(shown, comparison)
    config = public(config, path.absolute().parent)
    return ModelSubject(shown, nodes, repo_id, license, config, found)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (path / "adapter_config.json").exists() and not (path / "config.json").exists()


def model_card(subject: ModelSubject) -> tuple[str, Files]:
    """The page, without its metadata; and the pictures that go beside it."""
    files = _pictures(subject)
    record = subject.record
    reports, stale = lm_eval_reports(subject.model)
    page = (
        environment(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            **making(subject, files),
            summary=_summary(subject),
            load=load_lines(subject),
            load_adapter=adapter_lines(subject, "adapter") if subject.has_adapter else "",
            comparison=subject.comparison,
            frontier=FRONTIER,
            win_rates=WIN_RATES,
            reports=[report["file"] for report in reports],
            tasks=[row for report in reports for row in _task_rows(report)],
            stale=stale,
            headlines=_figures(record, HEADLINES),
            other_figures=_figures(record, {name: name for name in _others(record)}),
            scorer=next(iter(record.get("recipe", {}).get("scorers") or []), ""),
            exam=exam_of(subject.model),
            limits=list(_limits(subject, bool(reports))),
            percent=_percent,
        )
    )
    return page, files


# ------------------------------------------------------------------------------------------------- in a word


def _summary(subject: ModelSubject) -> Markup:
    """What it is, in one sentence."""
    size = f"{subject.parameters / 1e6:.1f} million parameters"
    start = ", ".join(code(node.name) for node in subject.parents(START)) or "a model unknown"
    data = ", ".join(code(name) for name in dict.fromkeys(_trained_on(subject))) or "data unknown"
    by = f"{METHODS.get(subject.stage, subject.stage)}{' (LoRA)' if subject.uses_lora else ''}"
    what = {"reward": "A reward model", "chat": "A chat model", "base": "A base language model"}[subject.kind]
    if subject.is_adapter:
        what = f"A LoRA adapter: {what[0].lower()}{what[1:]} when put on {start}, with"
    else:
        what += " of"
    if subject.stage == "foreign":
        return Markup(f"{what} {size}, with no record of its making.")
    if subject.kind == "reward":
        return Markup(f"{what} {size}: it began as {start}, and learned from {data} which answer is better.")
    told = {
        "pretrain": f"trained from scratch on {data}; it goes on with a text, and answers no questions",
        "sft": f"{start} fine-tuned{' (LoRA)' if subject.uses_lora else ''} on {data}",
        "dpo": f"{start} aligned by {by} on the preferences in {data}",
        "kto": f"{start} aligned by {by} on the judged answers in {data}",
    }
    rewards = ", ".join(code(name) for name in _rewards(subject)) or "a reward unknown"
    usual = f"{start} optimised by {by} against the reward {rewards} on the prompts in {data}"
    return Markup(f"{what} {size}: {told.get(subject.stage, usual)}.")


def _trained_on(subject: ModelSubject) -> list[str]:
    written = [node.name for node in subject.parents(DATA)]
    return written or [one["name"] for one in subject.data if one.get("split") == "train"]


def _rewards(subject: ModelSubject) -> list[str]:
    written = [node.name for node in subject.parents(REWARD)]
    return written or [str(name) for name in subject.record.get("recipe", {}).get("reward_funcs") or []]


# -------------------------------------------------------------------------------------------------- pictures


def _pictures(subject: ModelSubject) -> Files:
    """Repository path -> picture."""
    path, found = subject.model.path, Files()
    if subject.comparison:
        beside = {name: subject.comparison.folder / Path(name).name for name in (WIN_RATES, FRONTIER)}
        found |= {name: one for name, one in beside.items() if one.exists()}
    elif (drawn := own_frontier(subject.model)) is not None:
        found[FRONTIER] = drawn
    if exam_of(subject.model) and (path / EXAM).exists():
        found[EXAM] = path / EXAM
    if (path / LOSS).exists():
        found[LOSS] = path / LOSS
    return found


# -------------------------------------------------------------------------------------------------- measured


def lm_eval_reports(model: ModelDirectory) -> tuple[list[Json], list[str]]:
    """What `trueup eval` measured on this model; and names of files that are of a model it once was."""
    reports, stale = [], []
    for path in sorted((model.path / "eval").glob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or not {"results", "variant", "settings"} <= content.keys():
            continue
        if content.get("identity") == model.identity:
            reports.append(content | {"file": f"eval/{path.name}"})
        else:
            stale.append(f"eval/{path.name}")
    return reports, stale


def _task_rows(report: Json) -> Iterator[Json]:
    settings = report["settings"]
    for figure in figures(report):
        yield {
            "task": figure.task,
            "metric": figure.metric + {1: " ↑", -1: " ↓"}.get(figure.better, ""),
            "value": f"{figure.value:.4g}",
            "reach": _reach(figure.stderr),
            "chance": "" if figure.chance is None else f"{figure.chance:.3g}",
            "documents": f"{figure.documents:,}" + (" (the first)" if settings.get("limit") else ""),
            "shots": report.get("n-shot", {}).get(figure.task, ""),
            "template": "on" if settings["apply_chat_template"] else "off",
        }


def _reach(stderr: float | None) -> str:
    """Half of a 95 % interval, in words where there is none."""
    if stderr is None:
        return "not known"
    reach = 1.96 * stderr
    return "all alike" if reach == 0 else f"± {reach:.2g}" if reach < 100 else f"± {reach:,.0f}"


def _percent(interval: Json) -> str:
    """56.0 % [52.6, 59.4]"""
    from trueup.eval.compare_statistics import percent
    from trueup.eval.statistics import Interval

    return percent(Interval(interval["estimate"], interval["low"], interval["high"]))


def exam_of(model: ModelDirectory) -> Json | None:
    """The exam of a reward model, if it is of these weights."""
    path = model.path / "eval" / "exam.json"
    found: Json = read_json(path) if path.exists() else {}
    mine = found.get("identity") == model.identity
    return dict(public(found, model.path.absolute().parent)) if mine else None


def _figures(record: Json, names: Mapping[str, str]) -> list[Json]:
    """Of the run's last figures, those with a name: label, value, and the reach of 95 % where known."""
    metrics, found = record.get("metrics", {}), []
    for name, label in names.items():
        if name not in metrics:
            continue
        error = metrics.get(f"{name}_stderr")
        reach = "" if error is None else f"± {1.96 * error:.2g}"
        found.append({"label": label, "value": f"{metrics[name]:.5g}", "reach": reach})
    return found


def _others(record: Json) -> list[str]:
    metrics = record.get("metrics", {})
    return [name for name in metrics if name not in HEADLINES and not name.endswith("_stderr")]


# ---------------------------------------------------------------------------------------------------- limits


def _limits(subject: ModelSubject, evaluated: bool) -> Iterator[str]:
    """What a reader must not expect, and what nobody has measured."""
    kind = subject.kind
    if kind == "base":
        yield "It goes on with a text. It was not trained to answer, to follow instructions or to decline."
    if subject.parameters < 1e9:
        yield (
            f"It is small: {subject.parameters:,} parameters. Beyond what it was trained on, expect it to be "
            "wrong."
        )
    names = {str(part["name"]) for node in subject.nodes.values() for part in node.record.get("data", [])}
    if any(name.startswith("lab/") for name in names):
        yield (
            "Its world is the lab's, which a program invented: what it says of people, places and facts is "
            "true of nothing else."
        )
    yield from _missing(subject, evaluated)
    if kind == "reward":
        yield from _weaknesses(exam_of(subject.model))
    metrics = subject.record.get("metrics", {})
    if metrics.get("alarms"):
        yield f"The guards raised {metrics['alarms']:.0f} alarms while it was trained."
    if kind == "chat" and _rewards(subject):
        yield (
            "It was optimised against a learned or programmed reward, and may have found what that reward "
            "overlooks; the comparison, if there is one, says how that came out."
        )


def _missing(subject: ModelSubject, evaluated: bool) -> Iterator[str]:
    if not subject.record:
        yield "How it was made is not recorded: data, recipe, seed, time and lineage are unknown."
    if subject.kind != "reward" and not evaluated:
        yield "Not measured: any task of lm-eval (trueup eval)."
    if subject.kind == "reward" and exam_of(subject.model) is None:
        yield "Not measured: the exam of the reward model (trueup exam)."
    if subject.kind == "chat" and subject.comparison is None:
        yield "Not measured: how it does against the model it began as (trueup compare)."
    yield "Not measured: safety, bias, toxicity, and any language but that of its data."
    seeds = subject.record.get("seeds", {})
    if "seed" in seeds:
        yield f"One run with one seed ({seeds['seed']}): another seed makes another model."


def _weaknesses(exam: Json | None) -> Iterator[str]:
    """What the exam found that a reward model does not see."""
    if exam is None:
        return
    missed = [
        f"{name} (its score falls in {probe['fell']['estimate']:.0%})"
        for name, probe in exam["must_matter"].items()
        if probe["fell"]["estimate"] < _FEW
    ]
    if missed:
        yield f"It often misses what makes an answer worse: {', '.join(missed)}. An optimiser will find that."
    for name, probe in exam["must_not_matter"].items():
        if not probe["passed"]:
            yield (
                f"{name.replace('_', ' ').capitalize()} alone changes a score by up to "
                f"{probe['largest']:.2g} standard deviations."
            )
