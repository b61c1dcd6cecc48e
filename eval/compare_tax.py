"""Bits per byte on held-out text from before alignment: with lm-eval's results, the alignment tax."""

import math
from collections.abc import Sequence
from typing import Any

from trueup.base.tokenizer import encode_documents
from trueup.eval.kl import completion_log_probs
from trueup.eval.sampler import Sample


def bits_per_byte(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Bits a model needs per byte of text; documents longer than its context are cut into pieces."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    pieces = [
        Sample(ids[start : start + 1], ids[start + 1 : start + context], "", True)
        for ids in encode_documents(tokenizer, list(texts))
        for start in range(0, len(ids) - 1, context - 1)
    ]
    nats = -sum(float(values.double().sum()) for values in completion_log_probs(model, pieces))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)
