"""What a round of PPO starts from: completions sampled from the policy, and the scores given to them.

A *generator* turns prompts into completions; anything with its signature will do, an engine such as vLLM too,
which would take over the policy's weights at each call:

    def generate(policy, prompts, keys, temperature) -> completions

prompts and completions are lists of token ids, a completion's end-of-sequence token included. `keys` name the
rows for the random numbers: equal keys draw equal numbers, whatever the batch, the rank, and the time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Sampler
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trueup.eval.rendering import as_completions
from trueup.eval.sampler import SamplingSettings, evaluating, sample
from trueup.eval.scorers import FunctionScorer, RewardModelScorer, Scorer, resolve_scorer
from trueup.eval.validation import same_tokens
from trueup.preference.value import row_mask
from trueup.recipes.errors import UsageError
from trueup.recipes.hub import names_model

Tokens = list[int]
Row = dict[str, Any]  # of the data set: `prompt`, and the columns that scorers may want


# ------------------------------------------------------------------------------------------------- prompts


class EpisodeSampler(Sampler[int]):
    """Indices of prompts, one for each episode: pass after pass over the data, each shuffled anew.

    A function of the seed alone, so a resumed run that skips what was seen goes on with the same prompts.
    Every round is full: its end may belong to one pass and its beginning to the pass before.
    """

    def __init__(self, prompts: int, episodes: int, seed: int) -> None:
        self.prompts, self.episodes, self.seed = prompts, episodes, seed

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.episodes, self.prompts):
            shuffled = torch.randperm(self.prompts, generator=generator).tolist()
            yield from shuffled[: self.episodes - start]


def episode_keys(step: int, rank: int, world_size: int, rows: int) -> range:
    """The numbers of a rank's episodes in a round, by which they draw: no two of a run share one."""
    first = (step * world_size + rank) * rows
    return range(first, first + rows)


# ---------------------------------------------------------------------------------------------- generation


class Generator(Protocol):
    """See the top of this file."""

    def __call__(
        self, policy: Any, prompts: list[Tokens], keys: Sequence[int], temperature: float
    ) -> list[Tokens]: ...


@dataclass
class BatchedGenerator:
    """trueup's sampler: prompts bucketed by length, finished rows dropped at once, random numbers by row."""

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    batch_size: int
    seed: int
    autocast: torch.dtype | None = None

    def __call__(
        self, policy: Any, prompts: list[Tokens], keys: Sequence[int], temperature: float
    ) -> list[Tokens]:
        settings = SamplingSettings(
            self.max_new_tokens, temperature, seed=self.seed, batch_size=self.batch_size
        )
        found = sample(policy, self.tokenizer, prompts, settings, keys=keys, autocast=self.autocast)
        return [one.ids for one in found]


@dataclass
class TransformersGenerator(BatchedGenerator):
    """The model's own `generate`, for models whose cache is of another kind. Slower: finished rows stay."""

    stop: frozenset[int] = frozenset()

    def __call__(
        self, policy: Any, prompts: list[Tokens], keys: Sequence[int], temperature: float
    ) -> list[Tokens]:
        # Complete, because what is missing would come from the model's own file: top_k 50 and the like.
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            repetition_penalty=1.0, eos_token_id=sorted(self.stop), pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        completions: dict[int, Tokens] = {}
        with evaluating(policy, self.autocast), torch.random.fork_rng():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                torch.manual_seed((self.seed << 32) ^ keys[rows[0]])
                for row, ids in zip(
                    rows, self._generate(policy, [prompts[r] for r in rows], config), strict=True
                ):
                    completions[row] = ids
        return [completions[row] for row in range(len(prompts))]

    def _generate(self, policy: Any, prompts: list[Tokens], config: GenerationConfig) -> list[Tokens]:
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor(
            [[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=policy.device
        )
        mask = row_mask(torch.tensor([len(prompt) for prompt in prompts], device=policy.device), width).flip(
            1
        )
        found = policy.generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)
        return [self._cut(row) for row in found[:, width:].tolist()]

    def _cut(self, ids: Tokens) -> Tokens:
        """Up to the first end-of-sequence token; what follows is padding."""
        ends = [place for place, token in enumerate(ids) if token in self.stop]
        return ids[: ends[0] + 1] if ends else ids


# ------------------------------------------------------------------------------------------------- rewards


@dataclass(frozen=True)
class Completions:
    """Completions of one round (or evaluation) on this rank."""

    rows: list[Row]
    prompts: list[Tokens]
    ids: list[Tokens]
    texts: list[str]
    ended: list[bool]  # by an end-of-sequence token of their own

    def __len__(self) -> int:
        return len(self.ids)

    def sequences(self) -> list[Tokens]:
        """Prompt and completion in one piece."""
        return [prompt + ids for prompt, ids in zip(self.prompts, self.ids, strict=True)]


class Rewards:
    """Several scorers as one reward: their weighted sum.

    Args:
        scorers: as `as_scorer` makes them.
        weights: one for each; default all 1.

    Raises:
        UsageError: there are none, or another number of weights.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        tokenizer: PreTrainedTokenizerBase,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not scorers:
            raise UsageError("reward_funcs: there is none; name a reward model's directory or a function")
        if weights is not None and len(weights) != len(scorers):
            raise UsageError(f"reward_weights: {len(weights)} weights for {len(scorers)} reward functions")
        self.scorers, self.tokenizer = list(scorers), tokenizer
        self.weights = torch.tensor(weights or [1.0] * len(scorers), dtype=torch.float64)

    def __call__(
        self, completions: Completions, **extra: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The rewards (B,), and what each scorer said (B,) by its name; both fp64, on the CPU.

        A scorer that says nan ("not my kind of row") is left out of that row's sum.

        Args:
            extra: handed on to the scorers beside the columns.

        Raises:
            UsageError: no scorer has anything to say of a row.
        """
        said = torch.stack([self.score(scorer, completions, **extra) for scorer in self.scorers], dim=1)
        silent = said.isnan().all(dim=1).nonzero().flatten().tolist()
        if silent:
            row = completions.rows[silent[0]]
            raise UsageError(
                f"reward_funcs: none of them gives a score to the prompt {str(row['prompt'])[:200]!r}"
            )
        names = [scorer.name for scorer in self.scorers]
        return (said * self.weights).nansum(dim=1), dict(zip(names, said.T, strict=True))

    def score(self, scorer: Scorer, completions: Completions, **extra: Any) -> torch.Tensor:
        """Scores (B,) of one scorer: of the policy's own tokens where a reward model reads the same ones."""
        if isinstance(scorer, RewardModelScorer) and same_tokens(scorer.tokenizer, self.tokenizer):
            return torch.tensor(scorer.score_tokens(completions.sequences()), dtype=torch.float64)
        rows = completions.rows
        columns: dict[str, Any] = {
            name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"
        }
        columns |= {"ended": completions.ended, "completion_ids": completions.ids, **extra}
        prompts = [row["prompt"] for row in rows]
        scores = scorer(prompts, as_completions(prompts, completions.texts), **columns)
        return torch.tensor(scores, dtype=torch.float64)

    def reward_model(self) -> PreTrainedModel | None:
        """The first reward model that reads the policy's tokens: what a value model may start from."""
        for scorer in self.scorers:
            if isinstance(scorer, RewardModelScorer) and same_tokens(scorer.tokenizer, self.tokenizer):
                return scorer.model
        return None


def as_scorer(
    function: str | PreTrainedModel | Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    autocast: torch.dtype | None,
    place: str = "reward_funcs",
) -> Scorer:
    """One of `reward_funcs` as a scorer.

    Args:
        function: a reward model's directory or Hub id, `module:function` or a registered name; a loaded
            reward model that reads the policy's tokens; or a callable with TRL's signature.
        tokenizer: the policy's.

    Raises:
        UsageError: there is no such scorer.
    """
    if isinstance(function, str | Path):
        named = names_model(function)
        options: dict[str, Any] = {"device": str(device), "autocast": autocast} if named else {}
        return resolve_scorer(str(function), place, **options)
    if isinstance(function, PreTrainedModel):
        name = Path(function.config._name_or_path or type(function).__name__).name
        return RewardModelScorer(function.eval().to(device), tokenizer, name, autocast=autocast)
    if isinstance(function, FunctionScorer | RewardModelScorer):
        return function
    return FunctionScorer(function, getattr(function, "__name__", type(function).__name__))


# ------------------------------------------------------------------------------------------------ the round


@dataclass
class Rollout:
    """What the updates of a round learn from: (B, T) in fp32, 0 on padding; T is the longest completion."""

    completions: Completions
    mask: torch.Tensor
    log_probs: torch.Tensor
    reference_log_probs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @classmethod
    def empty(cls, completions: Completions, device: torch.device) -> "Rollout":
        """With the mask set and nothing else."""
        mask = row_mask(torch.tensor([len(ids) for ids in completions.ids], device=device))
        return cls(completions, mask, *(torch.zeros(mask.shape, device=device) for _ in range(6)))

    def batch(self, rows: Sequence[int], pad_token_id: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `completion_mask` (b, W) of some rows, padded on the right as far as needed."""
        prompts = [self.completions.prompts[row] for row in rows]
        ids = [self.completions.ids[row] for row in rows]
        width = max(len(prompt) + len(one) for prompt, one in zip(prompts, ids, strict=True))
        input_ids = torch.full((len(rows), width), pad_token_id)
        completion_mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, (prompt, one) in enumerate(zip(prompts, ids, strict=True)):
            end = len(prompt) + len(one)
            input_ids[row, :end] = torch.tensor(prompt + one)
            completion_mask[row, len(prompt) : end] = True
        device = self.mask.device
        return {"input_ids": input_ids.to(device), "completion_mask": completion_mask.to(device)}

    def micro_batches(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """The rows in groups of like length: little is padding. Longest first: memory peaks at once."""
        lengths = [len(sequence) for sequence in self.completions.sequences()]
        order = sorted(rows, key=lambda row: (-lengths[row], row))
        return [order[start : start + size] for start in range(0, len(order), size)]


def mini_batches(rows: int, number: int, generator: torch.Generator) -> list[list[int]]:
    """The rows of a round dealt out into so many mini-batches of equal size."""
    shuffled = torch.randperm(rows, generator=generator).tolist()
    size = math.ceil(rows / number)
    return [shuffled[start : start + size] for start in range(0, rows, size)]
