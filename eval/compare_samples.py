"""What each arm says to the same prompts, and what the scorers make of it.

An arm is one model directory, or several: the seeds of one method. All are sampled on the same prompts at
temperature 1, repetition k with the sampler's seed + k; a lone directory is repeated as often as the others
have seeds. Best-of-n is a virtual arm: candidates of the baseline, the best by a reward model kept.

Samples are kept on disk as they are made, under a name that tells all they depend on. So an arm that was
sampled is not sampled again: not after a crash, and not when another arm joins.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoTokenizer

from trueup.eval.kl import log_ratios
from trueup.eval.loading import load_policy
from trueup.eval.pathologies import pathologies
from trueup.eval.rendering import as_completions, encode_prompt
from trueup.eval.sampler import Sample, SamplingSettings, sample
from trueup.eval.scorers import Scorer
from trueup.eval.validation import completion_scores, same_tokens
from trueup.recipes.directory import ModelDirectory, atomic_file, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
Measures = dict[str, np.ndarray]  # name -> (repetitions, prompts)

SAMPLES = "samples"
BASELINE = "baseline"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        directories: one, or one per seed.
        best_of: how many candidates of the (only) directory a reward model chooses from; 0: none.
    """

    name: str
    directories: Sequence[ModelDirectory]
    best_of: int = 0

    def directory(self, repetition: int) -> ModelDirectory:
        """Of a repetition: its seed's, or the only one."""
        return self.directories[repetition % len(self.directories)]


@dataclass(frozen=True)
class Answers:
    """What one arm said in one repetition, prompt by prompt.

    Args:
        file: where it is kept, below the output folder.
        rows: {"row", "completion", "ended", "ids", "log_prob"} and of a policy with the baseline's tokens
            "log_ratio" and "k3": sums over the completion's tokens, nats; of best-of-n "candidate", "proxy".
    """

    file: str
    rows: list[Row]

    def samples(self) -> list[Sample]:
        """As the sampler gave them, without the prompts' tokens and the log-probabilities of each token."""
        return [Sample([], row["ids"], row["completion"], row["ended"]) for row in self.rows]


@dataclass
class Bench:
    """Prompts, models and what was sampled so far.

    Args:
        prompts: rows with a `prompt`; the other columns are handed to the scorers.
        baseline: the reference of every KL.
        folder: where new samples go, file by file.
        earlier: where the samples of an earlier comparison are.
    """

    prompts: list[Row]
    baseline: ModelDirectory
    settings: SamplingSettings
    folder: Path
    earlier: Path
    device: str
    files: list[Path] = field(default_factory=list)  # all that this comparison rests on

    def __post_init__(self) -> None:
        self.load = lru_cache(maxsize=2)(self._load)
        self.tokenizer = lru_cache(maxsize=None)(AutoTokenizer.from_pretrained)

    def _load(self, path: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        model, tokenizer = load_policy(path)
        return model.to(self.device), tokenizer

    def answers(self, arm: Arm, repetition: int) -> Answers:
        """One completion per prompt of an arm that is a model."""
        policy = arm.directory(repetition)
        settings = self._settings(repetition)

        def make() -> list[Row]:
            model, tokenizer = self.load(policy.path)
            prompts = [row["prompt"] for row in self.prompts]
            said = sample(model, tokenizer, prompts, settings, log_probs=True, progress=True)
            reference, its_tokenizer = self.load(self.baseline.path)
            if not same_tokens(tokenizer, its_tokenizer):  # then there is no ratio of probabilities
                return [_row(place, one) for place, one in enumerate(said)]
            ratios = log_ratios(model, reference, said)
            return [
                _row(place, one) | {"log_ratio": float(r.sum()), "k3": float((np.expm1(-r) + r).sum())}
                for place, (one, r) in enumerate(zip(said, (r.numpy() for r in ratios), strict=True))
            ]

        return self._kept(f"{arm.name}-{repetition}", [policy.identity, settings], make)

    def candidates(self, count: int) -> list[Answers]:
        """`count` answers of the baseline to each prompt, with luck of their own."""
        found = []
        for number in range(count):
            keys = [(number + 1 << 32) + row for row in range(len(self.prompts))]
            settings = self._settings(0)

            def make(keys: list[int] = keys, settings: SamplingSettings = settings) -> list[Row]:
                model, tokenizer = self.load(self.baseline.path)
                prompts = [row["prompt"] for row in self.prompts]
                said = sample(model, tokenizer, prompts, settings, keys=keys, log_probs=True, progress=True)
                return [_row(place, one) for place, one in enumerate(said)]

            inputs = [self.baseline.identity, settings, number]
            found.append(self._kept(f"candidate-{number}", inputs, make))
        return found

    def best_of(self, arm: Arm, repetition: int, proxy: Scorer, proxy_identity: str) -> Answers:
        """Of each prompt's candidates the one that the proxy scores highest."""
        candidates = self.candidates(arm.best_of)

        def make() -> list[Row]:
            scores = np.array([self.score(proxy, self.baseline, one) for one in candidates])
            best = scores.argmax(axis=0)
            return [
                candidates[number].rows[row] | {"candidate": int(number), "proxy": float(scores[number, row])}
                for row, number in enumerate(best)
            ]

        inputs = [self.baseline.identity, self._settings(0), proxy_identity, arm.best_of]
        return self._kept(f"{arm.name}-{repetition}", inputs, make)

    def score(self, scorer: Scorer, policy: ModelDirectory, answers: Answers) -> list[float]:
        """One score per prompt."""
        tokenizer = self.tokenizer(policy.path)
        encoded = [
            Sample(encode_prompt(tokenizer, asked["prompt"]), one.ids, one.text, one.ended)
            for asked, one in zip(self.prompts, answers.samples(), strict=True)
        ]
        return completion_scores(scorer, tokenizer, self.prompts, encoded)

    def parts(self, answers: Answers) -> dict[str, list[float]]:
        """Gold's parts, 0 or 1 for each prompt."""
        from trueup.recipes.lab.gold import gold_parts

        prompts = [row["prompt"] for row in self.prompts]
        names = [name for name in self.prompts[0] if name != "prompt"]
        texts = [row["completion"] for row in answers.rows]
        ended = [row["ended"] for row in answers.rows]
        columns = {name: [row[name] for row in self.prompts] for name in names}
        return gold_parts(prompts, as_completions(prompts, texts), ended=ended, **columns)

    def _settings(self, repetition: int) -> SamplingSettings:
        changed = {"seed": self.settings.seed + repetition}
        return SamplingSettings(**{**vars(self.settings), **changed})

    def _kept(self, name: str, inputs: list[Any], make: Callable[[], list[Row]]) -> Answers:
        return Answers(*self.kept(name, inputs, make))

    def kept(self, name: str, inputs: list[Any], make: Callable[[], list[Row]]) -> tuple[str, list[Row]]:
        """(file below the output folder, rows), under a name that tells what they depend on; made and written
        if they are not there."""
        asked = [row["prompt"] for row in self.prompts]
        decisive = [self.baseline.identity, asked, *inputs]
        told = json.dumps(decisive, sort_keys=True, default=_settings_as_json)
        file = f"{name}.{hashlib.sha256(told.encode()).hexdigest()[:12]}.jsonl"
        path = next((p for p in (self.folder / file, self.earlier / file) if p.exists()), None)
        if path is None:
            print(f"{name}: {len(self.prompts):,} prompts", flush=True)
            path = self.folder / file
            write_rows(path, make())
        self.files.append(path)
        return f"{SAMPLES}/{file}", read_rows(path)


def _settings_as_json(settings: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(settings).items() if name != "batch_size"}


def _row(place: int, one: Sample) -> Row:
    return {
        "row": place,
        "completion": one.text,
        "ended": one.ended,
        "ids": one.ids,
        "log_prob": math.fsum(one.log_probs or []),
    }


def measures(answers: Answers) -> dict[str, list[float]]:
    """What needs no scorer: `characters` and `tokens`, and where there is a KL `log_ratio` and `k3`."""
    found = {
        "characters": [float(len(row["completion"])) for row in answers.rows],
        "tokens": [float(len(row["ids"])) for row in answers.rows],
    }
    if "log_ratio" in answers.rows[0]:
        found |= {name: [row[name] for row in answers.rows] for name in ("log_ratio", "k3")}
    return found


def text_figures(answers: Answers) -> dict[str, float]:
    """The pathologies of one arm in one repetition; `entropy` (nats per token) where it is a policy's."""
    figures = pathologies(answers.samples())
    if "candidate" not in answers.rows[0]:
        tokens = sum(len(row["ids"]) for row in answers.rows)
        figures["entropy"] = -sum(row["log_prob"] for row in answers.rows) / tokens
    return figures


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """JSON lines, whole or not at all."""
    with writing(path), atomic_file(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
