"""Tasks in files, and requests as lm-eval makes them: shared by the tests of the harness."""

import json
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

QUESTIONS = [
    {"question": "who sings?", "choices": ["the bird", "a stone", "nobody at all"], "gold": 0},
    {"question": "what is wet", "choices": ["rain", "sand"], "gold": 0},
    {
        "question": "where do fish live, and why there?",
        "choices": ["up", "in the sea", "on a hill"],
        "gold": 1,
    },
    {"question": "q", "choices": ["a", "b", "c", "dd"], "gold": 3},
    {"question": "is it so?", "choices": ["yes", "not at all, never"], "gold": 1},
]
TEXTS = ["a b c", "the rain fell on the stones.\nall of it", "Ünïcode", "one two three four five six seven"]


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **keys: Any) -> Path:
    """NAME.yaml and the rows it reads, beside it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config | keys))  # JSON is YAML
    return path


def quiz(folder: Path, name: str = "quiz", rows: list[dict[str, Any]] | None = None, **keys: Any) -> Path:
    """A multiple-choice task."""
    usual = {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    }  # fmt: skip
    return write_task(folder, name, rows or QUESTIONS, **usual | keys)


def prose(folder: Path, name: str = "prose", texts: list[str] | None = None) -> Path:
    """A task of text whose perplexity is measured."""
    metrics = {
        "word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    }  # fmt: skip
    return write_task(
        folder, name, [{"text": text} for text in texts or TEXTS],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in metrics.items()
        ],
    )  # fmt: skip


def request(kind: str, *arguments: Any) -> Instance:
    """A request of lm-eval's."""
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("t", 0, 1))  # type: ignore[arg-type]


@torch.no_grad()
def nats(model: Any, context: list[int], answer: list[int]) -> float:
    """The log-likelihood of an answer by one plain forward of one row: what every batch must equal."""
    logits = model(torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(context) + place - 1, token]) for place, token in enumerate(answer))
