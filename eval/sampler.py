"""Sampling on frozen prompts: fast in batches, and no row ever depends on its neighbours.

Every row draws its own random numbers, keyed by (seed, row), one per token. So its text is the same
whatever the batch size, the order, the padding and the other rows, up to rounding of the logits; a run can
be continued, or one row be looked at again, and arms that are compared share their luck.

The loop keeps one cache, which grows in blocks. Rows that finish leave it at once: the last row moves into
their place.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from transformers.cache_utils import Cache, DynamicLayer

from trueup.eval.rendering import Text, encode_prompt
from trueup.recipes.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BLOCK = 32  # places by which a cache grows


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample.

    Args:
        max_new_tokens: a completion that long is cut; its `ended` is False.
        temperature: divides the logits; 0 is greedy.
        top_k: only the k likeliest tokens (and what ties with the last of them); 0: all.
        top_p: only the smallest set of likeliest tokens that holds this probability; 1: all.
        seed: decides, together with a row's key, all its random numbers; a training loop changes it each
            round.
        batch_size: rows decoded together. A matter of memory and speed alone.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        wrong = {
            "max_new_tokens": self.max_new_tokens < 1,
            "temperature": not 0 <= self.temperature < float("inf"),
            "top_k": self.top_k < 0,
            "top_p": not 0 < self.top_p <= 1,
            "batch_size": self.batch_size < 1,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise UsageError(f"{name}: {getattr(self, name)} is out of range")

    @property
    def pure(self) -> bool:
        """Whether samples come from the model's own distribution, which is what a KL is measured on."""
        return self.temperature == 1 and self.top_k == 0 and self.top_p == 1


@dataclass(frozen=True)
class Sample:
    """One completion.

    Args:
        prompt_ids: the prompt as the model saw it.
        ids: the tokens sampled, the eos included if it `ended`.
        text: the same decoded, without special tokens.
        ended: False if it was cut by `max_new_tokens` or the end of the context.
        log_probs: of each token at temperature 1 in nats, if asked for.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    ended: bool
    log_probs: list[float] | None = None


def sample(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Text | list[int]],
    settings: SamplingSettings,
    *,
    keys: Sequence[int] | None = None,
    log_probs: bool = False,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> list[Sample]:
    """One completion per prompt, in the order of the prompts.

    Args:
        model: a causal language model of Transformers that has a key/value cache.
        prompts: strings, conversations, or token ids.
        keys: a row's name for the random numbers, default its index. For k completions of a prompt repeat the
            prompt with k different keys.
        autocast: compute in this dtype (`torch.bfloat16`); the choice of the token stays fp32.
        progress: show a bar.

    Raises:
        UsageError: a prompt fills the context or is empty, or a key occurs twice with one prompt.
    """
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    keys = range(len(prompts)) if keys is None else keys
    if len(set(zip(map(tuple, encoded), keys, strict=True))) < len(encoded):
        raise UsageError("keys: a prompt has the same key twice, and would get the same completion twice")
    limits = _limits(model, encoded, settings.max_new_tokens)
    stop = eos_ids(model, tokenizer)
    # Longest first: rows of a batch are about as long, and memory is at its peak in the first one.
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
    samples: dict[int, Sample] = {}
    starts = range(0, len(order), settings.batch_size)
    with evaluating(model, autocast):
        for start in track(starts, "Sampling", disable=not progress):
            rows = order[start : start + settings.batch_size]
            noise = np.stack([uniforms(settings.seed, keys[row], settings.max_new_tokens) for row in rows])
            batch = _Batch(model, [encoded[row] for row in rows], [limits[row] for row in rows])
            tokens, chances = batch.decode(torch.from_numpy(noise), settings, stop, log_probs)
            for row, ids, chance in zip(rows, tokens, chances, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                ended = ids[-1] in stop
                samples[row] = Sample(encoded[row], ids, text, ended, chance if log_probs else None)
    return [samples[row] for row in range(len(encoded))]


def uniforms(seed: int, key: int, count: int) -> np.ndarray:
    """A row's random numbers in [0, 1), one per token: a counter-based stream, so the i-th is always the
    same."""
    state = np.array([seed % 2**64, key % 2**64], dtype=np.uint64)  # a list of large ones would become floats
    return np.random.Generator(np.random.Philox(key=state)).random(count)


def eos_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """What ends a completion: the tokenizer's eos and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [tokenizer.eos_token_id, *listed] if token is not None}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module, autocast: torch.dtype | None = None) -> Iterator[None]:
    """No dropout, no gradient, optionally autocast; the model's training flag is put back afterwards."""
    device = next(model.parameters()).device.type
    training = model.training
    model.eval()
    try:
        # One autocast region for all: it keeps the cast weights from step to step.
        with torch.no_grad(), torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        model.train(training)


def _encode(tokenizer: "PreTrainedTokenizerBase", prompt: Text | list[int]) -> list[int]:
    if isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int)):
        return prompt  # type: ignore[return-value]
    return encode_prompt(tokenizer, prompt)


def _limits(model: "PreTrainedModel", prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """How many tokens each row may get: until `max_new_tokens`, or where its context is full."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    for row, ids in enumerate(prompts):
        if not 0 < len(ids) < context:
            raise UsageError(
                f"prompts[{row}]: {len(ids)} tokens, and the model's context is {context}; "
                "a prompt needs at least one, and room for a reply: drop or shorten it"
            )
    return [min(max_new_tokens, context - len(ids)) for ids in prompts]


class _Batch:
    """Left-padded rows that are decoded together; each leaves when it has finished."""

    def __init__(self, model: "PreTrainedModel", prompts: list[list[int]], limits: list[int]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.width = max(map(len, prompts))
        self.limits = torch.tensor(limits, device=self.device)
        # The id of a padded place is of no account: the mask hides it.
        padded = [[0] * (self.width - len(ids)) + ids for ids in prompts]
        self.prompt_ids = torch.tensor(padded, device=self.device)
        # 1 where there is a token, or will be; a place of the cache that is still free is hidden at each
        # step.
        self.mask = torch.ones(len(prompts), self.width + max(limits), dtype=torch.long, device=self.device)
        for row, ids in enumerate(prompts):
            self.mask[row, : self.width - len(ids)] = 0
        self.layers = [RowLayer() for _ in range(_layer_count(model))]
        self.cache = Cache(layers=list(self.layers))

    def decode(
        self, noise: torch.Tensor, settings: SamplingSettings, stop: set[int], log_probs: bool
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and their log-probabilities at temperature 1 (zeros unless `log_probs`) of every row."""
        noise = noise.to(self.device)
        count, steps = len(self.prompt_ids), int(self.limits.max())
        tokens = torch.zeros(count, steps, dtype=torch.long, device=self.device)
        chances = torch.zeros(count, steps, device=self.device)
        lengths = self.limits.clone()
        stops = torch.tensor(sorted(stop), device=self.device)
        rows = torch.arange(
            count, device=self.device
        )  # which row of the batch sits in which slot of the cache
        mask, ids = self.mask, self.prompt_ids
        for step in range(steps):
            logits = self._forward(ids, mask[:, : self.width + step])
            chosen = choose(logits, noise[rows, step], settings)
            tokens[rows, step] = chosen
            if log_probs:
                chances[rows, step] = token_log_probs(logits, chosen)
            done = torch.isin(chosen, stops) | (step + 1 >= self.limits[rows])
            if done.any():
                lengths[rows[done]] = step + 1
                kept = slots_after(done)
                for layer in self.layers:
                    layer.keep(kept)
                rows, mask, chosen = rows[kept], mask[kept], chosen[kept]
                if not len(rows):
                    break
            ids = chosen[:, None]
        ends = lengths.tolist()
        return (
            [row[:end] for row, end in zip(tokens.tolist(), ends, strict=True)],
            [row[:end] for row, end in zip(chances.tolist(), ends, strict=True)],
        )

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits (rows, V) of the next token, fp32."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        # Said outright: some back ends take a shorter mask that is all ones for no mask at all.
        room, _ = self.cache.get_mask_sizes(ids.shape[1], 0)
        mask = F.pad(mask, (0, room - mask.shape[1]))
        outputs = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = outputs.logits[:, -1].float()
        return logits


def choose(logits: torch.Tensor, noise: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Next tokens (B,) of logits (B, V): greedy, or where the cumulative distribution passes `noise` (B,).

    One random number per row instead of one per entry of the vocabulary, as Gumbel noise would need.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        smallest = logits.topk(settings.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if settings.top_p < 1:
        ranked, order = logits.sort(descending=True)
        before = ranked.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0  # the likeliest token always stays
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= settings.top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    # Summed in fp64, or the tail of a large vocabulary would be rounded away; MPS has none.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=wide)
    threshold = noise.to(wide)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p of tokens (...) under logits (..., V), in fp32."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(dim=-1)


def slots_after(done: torch.Tensor) -> torch.Tensor:
    """Which slot's content each remaining slot is to hold: itself, or if it is done, a live one from the
    end."""
    live = len(done) - int(done.sum())
    slots = torch.arange(live, device=done.device)
    slots[done[:live]] = live + (~done[live:]).nonzero()[:, 0]
    return slots


class RowLayer(DynamicLayer):
    """One layer's keys and values (rows, heads, places, width), with room ahead: `BLOCK` places at a time.

    Transformers' own layer grows by concatenation, that is it copies everything for each token. The whole
    room is handed out, and what is still free in it is masked: on a CPU a matrix product would copy a part
    of it first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values, self.length = key_states, value_states, key_states.shape[2]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key_states, value_states (rows, heads, T, width); returns all so far, and once decoding
        the room ahead."""
        if not self.is_initialized:  # the prompt attends to itself alone
            self.lazy_initialization(key_states, value_states)
            return self.keys, self.values
        room, _ = self.get_mask_sizes(key_states.shape[2])
        if room > self.keys.shape[2]:
            # Zeros, not garbage: a masked place still enters the sum over values, with weight 0.
            self.keys, self.values = (
                F.pad(states, (0, 0, 0, room - states.shape[2])) for states in (self.keys, self.values)
            )
        place = slice(self.length, self.length + key_states.shape[2])
        self.keys[:, :, place] = key_states
        self.values[:, :, place] = value_states
        self.length = place.stop
        return self.keys, self.values

    def keep(self, slots: torch.Tensor) -> None:
        """Let slot i hold what slot `slots[i]` held; the others go. Only rows that move are copied."""
        moved = slots != torch.arange(len(slots), device=slots.device)
        for states in (self.keys, self.values):
            states[: len(slots)][moved] = states[slots[moved]]
        self.keys, self.values = self.keys[: len(slots)], self.values[: len(slots)]

    def get_seq_length(self) -> int:
        """Places in use."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next `query_length` queries will meet, the room ahead included; and their
        offset."""
        if not self.length:
            return query_length, 0
        return -(-(self.length + query_length) // BLOCK) * BLOCK, 0


def _layer_count(model: "PreTrainedModel") -> int:
    return int(model.config.get_text_config().num_hidden_layers)
