"""The head of a model card: metadata by the Hub's schema, through huggingface_hub's own classes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trueup.app.card_lineage import base_on_hub
from trueup.app.card_model import ModelSubject, exam_of, lm_eval_reports
from trueup.app.card_subject import hub_type
from trueup.eval.results import figures

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

BY_TRL = ("sft", "reward", "dpo", "kto", "rloo", "grpo")


def metadata(subject: ModelSubject) -> "ModelCardData":
    """Everything that the Hub sorts and links by; the licence is the one that was given, or none."""
    from huggingface_hub import ModelCardData

    base = base_on_hub(subject.nodes, subject.model.identity)
    results = list(_results(subject))
    hub_sets = [one["name"] for one in subject.data if "revision" in one and one.get("split") == "train"]
    tags = ["trueup", *([] if subject.stage == "foreign" else [_tag(subject)])]
    tags += ["trl"] if subject.stage in BY_TRL else []
    tags += ["lora"] if subject.uses_lora or subject.is_adapter else []
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if subject.is_adapter else "finetune",
        datasets=list(dict.fromkeys(hub_sets)) or None,
        library_name="peft" if subject.is_adapter else "transformers",
        license=subject.license,
        pipeline_tag="text-classification" if subject.kind == "reward" else "text-generation",
        tags=tags,
        model_name=subject.name if results else None,
        eval_results=results or None,
    )


def _tag(subject: ModelSubject) -> str:
    return {"reward": "reward-model", "pretrain": "pretraining"}.get(subject.stage, subject.stage)


def _results(subject: ModelSubject) -> Iterator["EvalResult"]:
    """For the model index: lm-eval's figures, each with its standard error as lm-eval names it; the exam."""
    from huggingface_hub import EvalResult

    for report in lm_eval_reports(subject.model)[0]:
        how = f" ({', '.join(report['variant'])})" if report["variant"] else ""
        for one in figures(report):
            for name, value in ((one.metric, one.value), (f"{one.metric}_stderr", one.stderr)):
                if value is not None:
                    yield EvalResult(
                        task_type="text-generation", metric_type=name, metric_value=value,
                        metric_name=f"{name}{how}", task_name="Text generation",
                        dataset_type=one.task, dataset_name=one.task,
                    )  # fmt: skip
    if (exam := exam_of(subject.model)) is not None:
        right = exam["accuracy"]
        data = exam.get("data") or {"name": "held-out pairs"}
        yield EvalResult(
            task_type="text-classification", task_name="Preferring the better answer",
            dataset_type=hub_type(data), dataset_name=data["name"], dataset_split=data.get("split"),
            metric_type="accuracy", metric_value=right["estimate"],
            metric_name=f"accuracy, 95 % interval {right['low']:.4f} to {right['high']:.4f}",
        )  # fmt: skip
    if subject.comparison is not None and subject.kind != "reward":
        yield from subject.comparison.results()
