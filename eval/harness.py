"""Evaluation by lm-eval: tasks on a model, scores with standard errors, and what they depend on beside them.

    report = evaluate(model, tokenizer, load_tasks(["arc_easy"])[0], EvalSettings())
    save_report(report, Path("runs/lab/sft"))

A report is what lm-eval itself returns (`results`, `groups`, `n-samples`, `n-shot`, `versions`, `configs`),
with `settings` and `lengths` (how the requests fitted the model's context).
"""

import contextlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import numpy as np
import torch
from lm_eval import evaluator

from trueup.eval.harness_model import HarnessModel
from trueup.eval.harness_tasks import LoadedTask, load_tasks, quietly
from trueup.eval.results import figures
from trueup.eval.sampler import evaluating
from trueup.recipes.directory import atomic_file, write_json, writing
from trueup.recipes.errors import UsageError
from trueup.recipes.run import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Report = dict[str, Any]

FOLDER = "eval"
# Of metrics without a closed form; lm-eval's 100,000 take minutes, and 1,000 give the error to 2 %.
BOOTSTRAP = 1000
# metric -> derivative of the figure by the mean log-likelihood per word or byte
_RATIOS = {
    "word_perplexity": lambda figure: figure,
    "byte_perplexity": lambda figure: figure,
    "bits_per_byte": lambda figure: 1 / math.log(2),
}
_DESCRIPTIVE = ("name", "sample_len", "sample_count")  # of lm-eval's results; no figures


@dataclass(frozen=True)
class EvalSettings:
    """What a score depends on besides the model and the task.

    Args:
        num_fewshot: worked examples before each question; default: the task's own number, else none. A task
            that says 0 keeps it.
        apply_chat_template: ask as a user does, through the chat template; default: as the task says, else
            not.
        system_instruction: said before each question.
        limit: documents of each task, at most: its first ones.
        seed: which examples are shown, and what is sampled where a task samples.
        add_bos_token, batch_size: see `HarnessModel`.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool | None = None
    system_instruction: str | None = None
    limit: int | None = None
    seed: int = 1234
    add_bos_token: bool | None = None
    batch_size: int | None = None

    def variant(self, task: LoadedTask) -> list[str]:
        """In what a task is asked otherwise than it says itself, in words for a file's name."""
        named = {
            f"{self.num_fewshot}-shot": self.num_fewshot is not None,
            "chat": self.apply_chat_template is True and not task.chat,
            "no-chat": self.apply_chat_template is False and task.chat,
            "system": self.system_instruction is not None,
            "bos": self.add_bos_token is True,
            "no-bos": self.add_bos_token is False,
            f"first-{self.limit}": self.limit is not None,
        }
        return [name for name, holds in named.items() if holds]


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: LoadedTask,
    settings: EvalSettings,
    progress: bool = False,
) -> Report:
    """One task, or a group, on a model. Neither the model's mode nor any random state is changed.

    Returns:
        The report, JSON-able, with lm-eval's `samples`, which `save_report` writes apart.

    Raises:
        UsageError: the chat template is asked for, and the tokenizer has none.
    """
    started = time.time()
    chat = task.chat if settings.apply_chat_template is None else settings.apply_chat_template
    if chat and not tokenizer.chat_template:
        raise UsageError(
            f"{task.name}: asks through the chat template, and the tokenizer has none; leave the task out, "
            "or set apply_chat_template to false"
        )
    asked = HarnessModel(
        model,
        tokenizer,
        batch_size=settings.batch_size,
        add_bos_token=settings.add_bos_token,
        progress=progress,
    )
    with quietly(), _randomness(settings.seed, model.device), evaluating(model):
        report = _lm_eval(asked, task, settings, chat)
    report |= {
        "task": task.name,
        "variant": settings.variant(task),
        "settings": asdict(settings)
        | {"apply_chat_template": chat, "add_bos_token": asked.add_bos_token, "batch_size": asked.batch_size}
        | {
            "max_length": asked.max_length,
            "device": str(model.device),
            "dtype": str(model.dtype).split(".")[-1],
        },
        "lengths": asdict(asked.lengths),
        "chance": {name: known for name, rows in report["samples"].items() if (known := _chance(rows))},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "packages": versions() | {"lm_eval": lm_eval.__version__},
    }
    plain: Report = json.loads(json.dumps(report, default=_plain))
    return plain


def _lm_eval(asked: HarnessModel, task: LoadedTask, settings: EvalSettings, chat: bool) -> Report:
    """What lm-eval returns, with the standard errors that it does not know, and figures alone as results."""
    for name, one in task.loaded["tasks"].items():
        own = task.shots[name]
        keeps = own == 0 or settings.num_fewshot is None
        one.set_config("num_fewshot", (own or 0) if keeps else settings.num_fewshot)
        one.set_fewshot_seed(settings.seed)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has threads
    report: Report = evaluator.evaluate(
        lm=asked,
        task_dict=task.loaded,
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAP,
        system_instruction=settings.system_instruction,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    for name, metrics in report["results"].items():
        for described in _DESCRIPTIVE:
            metrics.pop(described, None)
        _add_ratio_errors(metrics, report["samples"].get(name, []))
    return report


def _plain(value: Any) -> Any:
    """What JSON has no word for: NumPy's numbers; functions in a task's configuration."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _add_ratio_errors(metrics: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """Standard errors where lm-eval says N/A: of figures made of the sums of log-likelihoods and of bytes or
    words over documents, by the delta method for a ratio of means."""
    for metric, derivative in _RATIOS.items():
        pairs = np.array([one[metric] for one in samples if isinstance(one.get(metric), list | tuple)], float)
        if len(pairs) < 2 or f"{metric},none" not in metrics:
            continue
        nats, sizes = pairs.T
        residuals = nats - nats.sum() / sizes.sum() * sizes
        error = math.sqrt(len(pairs) / (len(pairs) - 1) * (residuals**2).sum()) / sizes.sum()
        metrics[f"{metric}_stderr,none"] = error * derivative(metrics[f"{metric},none"])


def _chance(samples: Sequence[dict[str, Any]]) -> float | None:
    """The accuracy of guessing, where choices are offered; for mutual information each is asked twice."""
    offered = [len(one["arguments"]) // (1 + ("acc_mutual_info" in one)) for one in samples if "acc" in one]
    return sum(1 / count for count in offered) / len(offered) if offered and max(offered) > 1 else None


@contextlib.contextmanager
def _randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Random states of our own: a training goes on as if nothing had been measured."""
    ours, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpy_state)


# ------------------------------------------------------------------------------------------------- results


def save_report(report: Report, directory: Path, log_samples: bool = False) -> Path:
    """Write `eval/TASK.json` into a directory; the variant is part of the name: `arc_easy.5-shot.json`.

    A model directory stays the model it was: its identity does not count what is in `eval/`.

    Args:
        log_samples: write every document, request and answer beside it, as `TASK.jsonl`.
    """
    name = ".".join([report["task"], *report["variant"]]).replace("/", "--")
    path = directory / FOLDER / f"{name}.json"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {name: value for name, value in report.items() if name != "samples"})
    if log_samples:
        rows = [{"task": task, **row} for task, found in report["samples"].items() for row in found]
        with writing(path), atomic_file(path.with_suffix(".jsonl")) as partial:
            partial.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
            )
    return path


# --------------------------------------------------------------------------------------- along a training run


class TaskMeasure:
    """What `eval_tasks` measures at each evaluation of a training run: `Run.measure`.

    On the validation split of tasks that have one: test splits are for verdicts.

    Raises:
        UsageError: there is no such task, or its data cannot be had; before the training.
    """

    def __init__(self, names: list[str], limit: int | None, place: str) -> None:
        self.tasks = load_tasks(names, validation=True, place=place)
        self.settings = EvalSettings(limit=limit)

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Figures by `TASK/METRIC`. Every process measures all: none has to wait for another."""
        return {
            f"{figure.task}/{figure.metric}": figure.value
            for task in self.tasks
            for figure in figures(evaluate(model, tokenizer, task, self.settings))
        }
