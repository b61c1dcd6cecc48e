"""Replies that grow a token at a time: what the app and the server stream.

Each reply draws its own random numbers, as `trueup.eval.sampler` does, so the same seed and settings give the
same text whatever else is being generated at the time, and the text that `trueup compare` would sample.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trueup.app.chat import context_length, fit_conversation
from trueup.eval.rendering import Text, encode_prompt
from trueup.eval.sampler import Sample, SamplingSettings, choose, eos_ids, uniforms
from trueup.recipes.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVERY = (
    0.05  # seconds between two updates of a page: oftener than the eye asks for costs as much as the model
)


@dataclass(frozen=True)
class ReplySettings(SamplingSettings):
    """How a reply is sampled.

    Args:
        repetition_penalty: lowers the logits of tokens that stand in the conversation already, as
            Transformers does it; 1: not.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.repetition_penalty > 0:
            raise UsageError(f"repetition_penalty: {self.repetition_penalty} is out of range")

    def as_dict(self) -> dict[str, Any]:
        """What decides the text, JSON-able."""
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")
        return {name: getattr(self, name) for name in names}


class Generation:
    """One reply: call `step` until `finish` is set; to cancel it, stop calling.

    Args:
        prompt: a conversation, whose oldest exchanges are left out if a reply would not fit; or text that is
            continued.
        stop: texts that end the reply, and are not part of it.

    Attributes:
        finish: None while it grows, then `stop` (the model ended its turn, or said one of `stop`), `length`
            or `failed`.
        error: why it failed.
        seconds: spent on this reply alone.

    Raises:
        UsageError: the prompt leaves no room for a reply.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        prompt: Text,
        settings: ReplySettings,
        stop: Sequence[str] = (),
    ) -> None:
        import torch
        from transformers import DynamicCache

        self.model, self.tokenizer, self.settings, self.stop = model, tokenizer, settings, stop
        context = context_length(model, tokenizer)
        if isinstance(prompt, str):
            self.prompt_ids = encode_prompt(tokenizer, prompt)
        else:
            self.prompt_ids, _ = fit_conversation(tokenizer, prompt, context, settings.max_new_tokens)
        if not 0 < len(self.prompt_ids) < context:
            raise UsageError(f"that is {len(self.prompt_ids):,} tokens, and the model takes {context:,}")
        self.limit = min(settings.max_new_tokens, context - len(self.prompt_ids))
        self.ids: list[int] = []
        self.finish: str | None = None
        self.error: Exception | None = None
        self.seconds = 0.0
        self._ends = eos_ids(model, tokenizer)
        self._noise = torch.from_numpy(uniforms(settings.seed, 0, self.limit))
        self._cache = DynamicCache(config=model.config)

    def step(self) -> None:
        """Sample the next token."""
        import torch

        started = time.perf_counter()
        with torch.inference_mode():
            token = self._next()
        self.ids.append(token)
        if token in self._ends or (self.stop and any(word in self._decoded() for word in self.stop)):
            self.finish = "stop"
        elif len(self.ids) == self.limit:
            self.finish = "length"
        self.seconds += time.perf_counter() - started

    def _next(self) -> int:
        import torch
        from transformers import RepetitionPenaltyLogitsProcessor

        device = self.model.device
        new = torch.tensor([self.ids[-1:] or self.prompt_ids], device=device)
        outputs = self.model(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits = outputs.logits[:, -1].float()
        if self.settings.repetition_penalty != 1:
            said = torch.tensor([self.prompt_ids + self.ids], device=device)
            logits = RepetitionPenaltyLogitsProcessor(self.settings.repetition_penalty)(said, logits)
        noise = self._noise[len(self.ids), None].to(device)
        return int(choose(logits, noise, self.settings))

    @property
    def text(self) -> str:
        """What was said so far, without what may yet change: half a character, the beginning of a `stop`."""
        text = self._decoded()
        if self.finish is None:
            unsure = max(map(len, self.stop), default=1) - 1
            return text[: len(text) - unsure].rstrip("\ufffd")
        cuts = [place for word in self.stop if (place := text.find(word)) >= 0]
        return text[: min(cuts)] if cuts else text

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    @property
    def sample(self) -> Sample:
        """The reply as the instruments take it."""
        return Sample(self.prompt_ids, self.ids, self.text, self.ids[-1] in self._ends)


def stream(generations: Sequence[Generation]) -> Iterator[None]:
    """Let replies grow side by side, a token of each in turn, until all are finished.

    Comes back as soon as each has a token, then every `EVERY` seconds, and at the end.
    """
    growing = [one for one in generations if one.finish is None]
    shown = 0.0
    while growing:
        for one in growing:
            try:
                one.step()
            except Exception as error:  # out of memory, say: the others go on
                one.finish, one.error = "failed", error
        growing = [one for one in growing if one.finish is None]
        if not growing or time.perf_counter() - shown >= EVERY:
            yield
            shown = time.perf_counter()
