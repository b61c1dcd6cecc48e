"""Pretraining text mixed into SFT, so that a small model keeps what it read while it learns to answer.

Tuned on questions about some facts, a model of a few million parameters loses the others. InstructGPT mixed
pretraining text in for the same reason (https://arxiv.org/abs/2203.02155, section 3.5: PPO-ptx).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from trueup.base.tokenizer import encode_documents

BATCH = 1000


def replay_rows(
    texts: Iterable[str], tokenizer: Any, share: float, tokens: int, max_length: int | None
) -> Iterator[dict[str, list[int]]]:
    """Documents as tokenised rows, all of whose tokens are trained, until they make up their share.

    Args:
        share: of all tokens that are trained on, prompts included; below 1.
        tokens: those of the examples.
        max_length: longer documents are cut.
    """
    wanted = share / (1 - share) * tokens
    batch: list[str] = []
    for text in _with_end(texts):
        if text is not None:
            batch.append(text)
        if len(batch) == BATCH or text is None:
            for ids in encode_documents(tokenizer, batch):
                if wanted <= 0:
                    return
                kept = ids[:max_length]
                wanted -= len(kept)
                yield {"input_ids": kept, "labels": kept}
            batch = []


def _with_end(texts: Iterable[str]) -> Iterator[str | None]:
    yield from texts
    yield None
