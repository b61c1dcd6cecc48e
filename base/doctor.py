"""Whether a GPT, anyone's, keeps the contract that every stage relies on; and where not, what to change.

The stages know a model through Transformers' interface alone, and what breaks there mostly breaks silently: a
packed row that sees its neighbour, a padded row with shifted positions, a dropout that stays on. Each check
is one such promise, made to fail loudly.
"""

import copy
import inspect
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from trueup.base.stage import check_template
from trueup.recipes.errors import UsageError

LENGTH, NEW = 12, 6  # tokens of a probe row, and of what is generated after it
FORWARD = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "labels")


class Wrong(Exception):
    """A broken promise; the message says what to change."""


@dataclass
class Subject:
    """What is examined. The model is in evaluation mode; a check that changes it works on a copy."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    ids: torch.Tensor  # (2, LENGTH) tokens without special ones

    def logits(self, model: Any = None, **inputs: Any) -> torch.Tensor:
        """(B, T, vocab_size)"""
        model = self.model if model is None else model
        inputs = {"input_ids": self.ids, "use_cache": False} | inputs
        logits: torch.Tensor = model(**inputs).logits
        return logits

    def near(self, found: torch.Tensor, expected: torch.Tensor, problem: str) -> None:
        """Raise `problem` where logits differ by more than rounding."""
        allowed = 1e-4 * max(1.0, float(expected.detach().abs().max()))
        apart = float((found - expected).detach().abs().max())
        if not apart <= allowed:
            raise Wrong(f"{problem} (logits differ by {apart:.2g})")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; no problem is a pass."""

    name: str
    problem: str | None = None


# ---------------------------------------------------------------- the forward pass


def _interface(subject: Subject) -> None:
    parameters = inspect.signature(type(subject.model).forward).parameters
    missing = [name for name in FORWARD if name not in parameters]
    if missing:
        raise Wrong(f"forward() takes no {', '.join(missing)}: add them; Trainer, TRL and generate pass them")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise Wrong("forward() takes no **kwargs: add them, and hand them on to the attention")
    logits = subject.logits()
    if logits.shape != (*subject.ids.shape, subject.model.config.vocab_size):
        raise Wrong(f"logits are {tuple(logits.shape)}: make them (batch, length, config.vocab_size)")
    if not torch.isfinite(logits).all():
        raise Wrong("logits are not finite: look for a division or a mask of -inf over a whole row")
    trunk = getattr(subject.model, subject.model.base_model_prefix, None)
    if not isinstance(trunk, nn.Module) or trunk is subject.model:
        raise Wrong(
            "there is no trunk under base_model_prefix: name the module that returns hidden states there "
            '(base_model_prefix = "model"); TRL calls it, and the output layer itself'
        )


def _loss(subject: Subject) -> None:
    labels = subject.ids.clone()
    labels[:, :3] = -100
    logits = subject.logits()
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss = subject.model(subject.ids, labels=labels, use_cache=False).loss
    mean = float(summed) / int((labels[:, 1:] != -100).sum())
    if loss is None or not math.isclose(float(loss), mean, rel_tol=1e-4):
        raise Wrong(
            "loss is not the mean cross-entropy of the next token: shift the labels inside forward() "
            "(self.loss_function(logits, labels, vocab_size=..., **kwargs) does) and leave out -100"
        )
    counted = subject.model(subject.ids, labels=labels, num_items_in_batch=100, use_cache=False).loss
    if not math.isclose(float(counted), float(summed) / 100, rel_tol=1e-4):
        raise Wrong(
            "num_items_in_batch does not divide the summed loss: pass **kwargs on to self.loss_function, or "
            "gradient accumulation weighs short batches too much"
        )


def _causal(subject: Subject) -> None:
    changed = subject.ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % subject.model.config.vocab_size
    earlier = slice(None, -1)
    subject.near(
        subject.logits(input_ids=changed)[:, earlier],
        subject.logits()[:, earlier],
        "a token changes the logits before it: mask what comes later in the attention",
    )


def _padding(subject: Subject) -> None:
    expected, pad = subject.logits(), subject.ids.new_zeros(2, 5)
    ones = torch.ones_like(subject.ids)
    right = subject.logits(
        input_ids=torch.cat([subject.ids, pad], 1), attention_mask=torch.cat([ones, pad], 1)
    )
    subject.near(right[:, :LENGTH], expected, "padding on the right changes the logits: use attention_mask")
    left = subject.logits(
        input_ids=torch.cat([pad, subject.ids], 1), attention_mask=torch.cat([pad, ones], 1)
    )
    subject.near(
        left[:, 5:],
        expected,
        "padding on the left changes the logits: hide padding with attention_mask, and where position_ids "
        "are not given count positions by it: (attention_mask.cumsum(-1) - 1).clamp(min=0)",
    )


def _positions(subject: Subject) -> None:
    positions = torch.arange(LENGTH).expand(2, -1)
    subject.near(
        subject.logits(position_ids=positions),
        subject.logits(),
        "position_ids 0, 1, 2, ... give other logits than none: count from 0 where they are not given",
    )
    spread = positions * torch.tensor([[1], [2]])
    apart = (subject.logits(position_ids=spread) - subject.logits())[1].abs().max()
    if not float(apart) > 0:
        raise Wrong("position_ids change nothing: read positions from them, not from torch.arange")


def _cache(subject: Subject) -> None:
    model = subject.model
    out = model(input_ids=subject.ids[:, :-4], use_cache=True)
    if getattr(out, "past_key_values", None) is None:
        raise Wrong(
            "use_cache=True returns no past_key_values: make a DynamicCache, update() it in every attention, "
            "and return it in a CausalLMOutputWithPast"
        )
    steps = [out.logits]
    for step in range(LENGTH - 4, LENGTH):
        out = model(
            input_ids=subject.ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True
        )
        steps.append(out.logits)
    subject.near(
        torch.cat(steps, 1),
        subject.logits(),
        "logits with the cache differ: positions go on from past_key_values.get_seq_length(), and a "
        "single new token sees every key",
    )
    made = _generate(subject, model)
    ids = subject.ids
    for _ in range(NEW):
        ids = torch.cat([ids, subject.logits(input_ids=ids)[:, -1].argmax(-1, keepdim=True)], 1)
    if not torch.equal(made, ids):
        raise Wrong("generate() gives other tokens than greedy decoding without a cache: look at the cache")


def _generate(subject: Subject, model: Any, **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    return model.generate(
        subject.ids, attention_mask=torch.ones_like(subject.ids), pad_token_id=0, **settings
    )


def _packing(subject: Subject) -> None:
    positions = torch.arange(LENGTH).repeat(2)[None]
    packed = subject.logits(input_ids=subject.ids.view(1, -1), position_ids=positions)
    subject.near(
        packed.view_as(subject.logits()),
        subject.logits(),
        "documents packed into one row see each other: where position_ids restart a new one begins; "
        "create_causal_mask(config=, inputs_embeds=, attention_mask=, past_key_values=, position_ids=) of "
        "transformers.masking_utils finds that out, if the cache is made after it",
    )


# ---------------------------------------------------------------- weights


def _tied(subject: Subject) -> None:
    model = subject.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise Wrong(
            "get_input_embeddings() or get_output_embeddings() finds nothing: call the modules embed_tokens "
            "and lm_head, or write set/get_input_embeddings and set/get_output_embeddings"
        )
    one = head.weight is embedding.weight
    if one != bool(model.config.tie_word_embeddings):
        raise Wrong(
            f"config.tie_word_embeddings is {model.config.tie_word_embeddings} and embedding and output "
            f"layer are {'one matrix' if one else 'two matrices'}: set it right, and name the tie in "
            '_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}; call self.post_init()'
        )


def _saved(subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        loaded = type(subject.model).from_pretrained(folder).eval()
        advice = (
            "a saved model loads as another one: weights outside parameters, or a buffer registered with "
            "persistent=False, are not saved; compute such a buffer in forward() or save it"
        )
        subject.near(subject.logits(loaded), subject.logits(), advice)
        one = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        if one != bool(subject.model.config.tie_word_embeddings):
            raise Wrong("the tie of embedding and output layer is lost by saving: see _tied_weights_keys")
        for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
            try:
                auto_class.from_pretrained(folder)
            except ValueError as error:
                reason = str(error).splitlines()[0][:120]
                raise Wrong(
                    f"{auto_class.__name__} does not open it ({reason}): where its module is imported, call "
                    f"{auto_class.__name__}.register(YourConfig, YourClass), AutoModel.register for the "
                    "trunk and AutoConfig.register; the reward stage needs a ForSequenceClassification"
                ) from error


# ---------------------------------------------------------------- training


def _gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _checkpointing(subject: Subject) -> None:
    model = copy.deepcopy(subject.model).train()
    expected = _gradients(model, subject.ids)
    still = [name for name, p in model.named_parameters() if p.requires_grad and name not in expected]
    if still:
        raise Wrong(f"{', '.join(still[:3])} get no gradient: use them in forward(), or take them out")
    if not model.supports_gradient_checkpointing:
        raise Wrong(
            "activation checkpointing is not supported: derive the block from "
            "transformers.modeling_layers.GradientCheckpointingLayer and set supports_gradient_checkpointing"
        )
    model.activation_checkpointing_enable()
    for name, gradient in _gradients(model, subject.ids).items():
        if not torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-4):
            raise Wrong(
                f"activation checkpointing changes the gradient of {name}: pass hidden states to the block "
                "positionally, and nothing that forward() changes in place"
            )


def _dropout(subject: Subject) -> None:
    from trl.trainer.utils import disable_dropout_in_model

    model = copy.deepcopy(subject.model).train()
    disable_dropout_in_model(model)
    subject.near(
        subject.logits(model),
        subject.logits(),
        "dropout stays on where TRL turns it off: hold each rate in an nn.Dropout and read its .p, instead "
        "of a number handed to F.dropout or scaled_dot_product_attention",
    )


def _fused(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (2, LENGTH - 1) as TRL's losses compute them, and as the model's own logits say."""
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

    policy = copy.deepcopy(subject.model).train()
    disable_dropout_in_model(policy)
    add_fused_lm_head(policy)
    found = policy(subject.ids, labels=subject.ids, fused_lm_head=True, use_cache=False).log_probs
    own = subject.logits()[:, :-1].log_softmax(-1).gather(-1, subject.ids[:, 1:, None])[..., 0]
    return found, own


def _kl(subject: Subject) -> None:
    out = _generate(subject, subject.model, do_sample=True, top_k=0, output_logits=True,
                    return_dict_in_generate=True)  # fmt: skip
    sampled = torch.stack(out.logits, 1).log_softmax(-1)
    trained = subject.logits(input_ids=out.sequences)[:, LENGTH - 1 : -1].log_softmax(-1)
    kl = float((sampled.exp() * (sampled - trained)).sum(-1).max())
    if not abs(kl) < 1e-4:
        raise Wrong(
            f"the KL between what generates and what is trained is {kl:.2g} before the first step, and must "
            "be 0: generation changes logits (a scale, a cap, a cache), or forward() depends on use_cache"
        )


def _dpo(subject: Subject) -> None:
    policy, reference = _fused(subject)
    margin = (policy - reference).sum(-1)
    loss = float(-F.logsigmoid(0.1 * (margin[0] - margin[1])))
    if not math.isclose(loss, math.log(2), abs_tol=1e-4):
        raise Wrong(
            f"DPO's loss against an equal reference is {loss:.4f} before the first step, and must be ln 2 = "
            "0.6931: TRL takes hidden states and output layer and skips forward(); a factor on the logits "
            "belongs in config.logit_scale, a cap in config.final_logit_softcapping"
        )


# ---------------------------------------------------------------- tokenizer


def _end(subject: Subject) -> None:
    tokenizer, config = subject.tokenizer, subject.model.config
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    if None in ids.values() or ids["eos"] == ids["pad"]:
        raise Wrong(
            "the tokenizer needs an eos token and a pad token, and they must differ: padding that is masked "
            "hides the end as well, and the model never learns to stop"
        )
    if len(tokenizer) > config.vocab_size:
        raise Wrong(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {config.vocab_size:,} embeddings: "
            "make vocab_size at least as large before training"
        )
    for holder, place in ((config, "config"), (subject.model.generation_config, "generation_config")):
        ends = holder.eos_token_id if isinstance(holder.eos_token_id, list) else [holder.eos_token_id]
        if ids["eos"] not in ends:
            raise Wrong(
                f"{place}.eos_token_id is {holder.eos_token_id} and the tokenizer's {ids['eos']}: set it, or "
                "generate() runs on"
            )


def _template(subject: Subject) -> None:
    try:
        check_template(subject.tokenizer, masked=True)
    except UsageError as error:
        raise Wrong(str(error)) from error


CHECKS: dict[str, Callable[[Subject], None]] = {
    "interface": _interface,
    "loss": _loss,
    "causality": _causal,
    "padding": _padding,
    "position ids": _positions,
    "cache": _cache,
    "packing": _packing,
    "tied weights": _tied,
    "save and load": _saved,
    "gradient checkpointing": _checkpointing,
    "dropout": _dropout,
    "step-0 KL": _kl,
    "step-0 DPO loss": _dpo,
    "end of text": _end,
    "chat template": _template,
}


def examine(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Run every check on a causal language model, one finding each.

    Args:
        model: a PreTrainedModel with GenerationMixin; its weights are not changed. It runs in fp32.
    """
    model = model.float().eval()
    plain = [i for i in range(model.config.vocab_size) if i not in tokenizer.all_special_ids]
    picks = torch.randint(len(plain), (2, LENGTH), generator=torch.Generator().manual_seed(0))
    subject = Subject(model, tokenizer, torch.tensor(plain)[picks])
    for name, check in CHECKS.items():
        problem = None
        with torch.set_grad_enabled(check is _checkpointing):
            try:
                check(subject)
            except Wrong as wrong:
                problem = str(wrong)
            except Exception as error:  # anything may break in someone else's model
                problem = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                )
        yield Finding(name, problem)
