"""What must hold on the first batch of a fresh run, before anything is trained, and which keys a loss reads.

Policy and reference are the same model then. So every margin is 0, and every loss has a value that can be
worked out by hand; a wrong reference, a template without its end, or dropout that is still on shows at once
rather than as a model that is a little worse.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trueup.eval.kl import completion_log_probs
from trueup.eval.sampler import Sample
from trueup.recipes.errors import TrueupError

LN2 = math.log(2)


def _exo(beta: float, smoothing: float) -> float:
    return -LN2 - 0.5 * (math.log1p(-smoothing) + math.log(smoothing))


# Each loss_type of TRL's DPOTrainer at zero margin, as a function of (beta, label_smoothing). `sft` is not
# here: it is the mean cross-entropy of the chosen tokens, whatever the margin.
AT_ZERO_MARGIN: dict[str, Callable[[float, float], float]] = {
    "sigmoid": lambda beta, smoothing: LN2,
    "sigmoid_norm": lambda beta, smoothing: LN2,
    "hinge": lambda beta, smoothing: 1.0,
    "ipo": lambda beta, smoothing: 1 / (4 * beta**2),
    "exo_pair": _exo,
    "nca_pair": lambda beta, smoothing: 2 * LN2,
    "robust": lambda beta, smoothing: LN2,  # ((1 - e) ln 2 - e ln 2) / (1 - 2e)
    "bco_pair": lambda beta, smoothing: 2 * LN2,
    "sppo_hard": lambda beta, smoothing: 1 / (2 * beta**2),
    "aot": lambda beta, smoothing: LN2,
    "aot_unpaired": lambda beta, smoothing: LN2,
    "apo_zero": lambda beta, smoothing: 1.0,
    "apo_down": lambda beta, smoothing: 1.0,
    "discopop": lambda beta, smoothing: (1 + LN2) / 2,
}
LOSS_TYPES = (*AT_ZERO_MARGIN, "sft")
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # those that read label_smoothing
# Those that an f-divergence other than reverse_kl has a meaning for; TRL refuses it for the rest.
DIVERGENT = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}


def loss_contradictions(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) for keys of DPOConfig that a run with these losses would ignore, or cannot have."""
    losses = given.get("loss_type", ["sigmoid"])
    named = ", ".join(losses)
    for wrong in [loss for loss in losses if loss not in LOSS_TYPES]:
        yield "loss_type", f"there is no loss {wrong}; the losses are {', '.join(LOSS_TYPES)}"
    weights = given.get("loss_weights")
    if weights is not None and len(weights) != len(losses):
        yield "loss_weights", f"has {len(weights)} weights for {len(losses)} losses ({named}): one for each"
    smoothing = given.get("label_smoothing", 0.0)
    if smoothing and not SMOOTHED & {*losses}:
        others = ", ".join(sorted(SMOOTHED))
        yield "label_smoothing", f"is ignored by {named}; delete it, or choose a loss that reads it: {others}"
    if "exo_pair" in losses and not smoothing:
        yield "loss_type", "exo_pair needs a label_smoothing above 0; its paper takes 1e-3"
    if smoothing and not 0 < smoothing < 0.5:
        yield (
            "label_smoothing",
            f"is the share of labels that are wrong, from 0 to below 0.5, not {smoothing}",
        )
    if given.get("f_divergence_type", "reverse_kl") != "reverse_kl":
        without = [loss for loss in losses if loss not in DIVERGENT | {"sft"}]
        if without or losses == ["sft"]:
            yield "f_divergence_type", f"has no meaning for {', '.join(without or losses)}; delete it"
    if "f_alpha_divergence_coef" in given and given.get("f_divergence_type") != "alpha_divergence":
        yield "f_alpha_divergence_coef", "is read with f_divergence_type: alpha_divergence alone; delete it"
    if "discopop_tau" in given and "discopop" not in losses:
        yield "discopop_tau", f"is ignored by {named}; delete it"
    if losses == ["sft"]:
        for name in ("beta", "ld_alpha"):
            if name in given:
                yield name, "is ignored by sft; delete it"
    if given.get("ld_alpha") is not None and not 0 <= given["ld_alpha"] <= 1:
        yield "ld_alpha", f"is a share from 0 to 1, not {given['ld_alpha']}"
    if given.get("beta", 0.1) <= 0:
        yield "beta", f"must be above 0, not {given['beta']}"
    if given.get("use_weighting") and {"aot", "aot_unpaired"} & {*losses}:
        yield "use_weighting", f"cannot weight {named}: aot sorts the rows, so weights would not fit them"


# --------------------------------------------------------------------------------------------- on a batch


@dataclass(frozen=True)
class Allowed:
    """Rounding, by the precision of the run.

    Args:
        margin: |log-ratio| of an answer in nats, beside `share` of its log-probability.
        loss: of the loss, as a share of it (at least of 1).
    """

    margin: float
    share: float
    loss: float


ROUNDING = {
    torch.float32: Allowed(margin=1e-4, share=1e-6, loss=1e-4),
    torch.float16: Allowed(margin=1e-2, share=2e-3, loss=5e-3),
    torch.bfloat16: Allowed(margin=5e-2, share=1e-2, loss=2e-2),
}


def dropout_left(model: nn.Module) -> list[str]:
    """Modules that still drop something in training mode, as `name (p)`: nn.Dropout, and numbers that an
    attention hands to a functional dropout."""
    found = []
    for name, part in model.named_modules():
        if "Dropout" in type(part).__name__ and part.p > 0:
            found.append(f"{name} ({part.p})")
        found += [
            f"{name}.{key} ({value})"
            for key, value in vars(part).items()
            if "dropout" in key and isinstance(value, float) and value > 0
        ]
    return found


def check_dropout(model: nn.Module) -> None:
    """Raises TrueupError where something would still be dropped."""
    if found := dropout_left(model):
        raise TrueupError(
            f"dropout is on in {', '.join(found[:3])}: margins would begin as noise instead of 0; "
            "set it to 0 in the model's config.json"
        )


_TWO_ENDS = "the data already holds it, and it is added once more; take it out of the texts"
_NO_END = (
    "the chat template does not close the assistant's turn with the tokenizer's eos token; correct "
    "chat_template.jinja in the model's directory"
)


def check_tokens(inputs: Mapping[str, torch.Tensor], eos_token_id: int, max_length: int | None) -> float:
    """Every answer has its end of turn, once, and prompts are not trained.

    Args:
        inputs: `input_ids`, `attention_mask`, `completion_mask`, each (rows, T), as TRL collates them.
        max_length: rows of this length were cut, and have no end.

    Returns:
        The share of tokens that are trained.

    Raises:
        TrueupError: they do not.
    """
    trained, real = inputs["completion_mask"].bool(), inputs["attention_mask"].bool()
    fraction = float(trained.sum() / real.sum())
    if not 0 < fraction < 1:
        which = "no token of an answer is" if fraction == 0 else "every token is, prompts included,"
        raise TrueupError(
            f"on the first batch {which} trained; check the columns prompt and chosen, rejected or completion"
        )
    # Some templates write a newline after the end of turn, so the last three tokens are looked at.
    answers = [ids[mask][-3:].tolist() for ids, mask in zip(inputs["input_ids"], trained, strict=True)]
    ends = [answer.count(eos_token_id) for answer in answers]
    whole = (real.sum(dim=1) < (max_length or math.inf)).tolist()
    wrong = [count for count, is_whole in zip(ends, whole, strict=True) if is_whole and count != 1]
    if wrong:
        raise TrueupError(
            f"first batch: {len(wrong)} of {len(ends)} answers end with {max(wrong) or 'no'} end of turn, "
            f"and it must be one each: {_TWO_ENDS if max(wrong) else _NO_END}"
        )
    if not any(ends):
        raise TrueupError(
            f"on the first batch max_length {max_length} cuts the end off every answer, so the model would "
            "not learn to stop; raise it"
        )
    return fraction


def answer_log_probs(
    model: Any, inputs: Mapping[str, torch.Tensor], autocast: torch.dtype | None
) -> list[torch.Tensor]:
    """log p in nats of each answer's tokens, one (T_i,) tensor per row: from the model's own logits, in
    evaluation mode, by none of the code that trains."""
    samples = []
    for ids, real, trained in zip(
        inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool(), strict=True
    ):
        samples.append(Sample(ids[real & ~trained].tolist(), ids[trained].tolist(), text="", ended=True))
    return completion_log_probs(model, samples, autocast=autocast)


def expected_loss(
    losses: Sequence[str], weights: Sequence[float], beta: float, smoothing: float, chosen: list[torch.Tensor]
) -> float:
    """The weighted sum of TRL's losses at zero margin, in nats.

    Args:
        chosen: log p of the chosen answers' tokens, for `sft`.
    """
    sft = -float(torch.cat(chosen).double().mean())
    values = [sft if name == "sft" else AT_ZERO_MARGIN[name](beta, smoothing) for name in losses]
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))


def check_margins(log_ratios: Mapping[str, float], log_probs: Sequence[float], allowed: Allowed) -> None:
    """Policy and reference say the same.

    Args:
        log_ratios: mean log policy - log reference in nats, by side.
        log_probs: of the answers, which rounding grows with.

    Raises:
        TrueupError: they do not.
    """
    limit = allowed.margin + allowed.share * max(map(abs, log_probs))
    for side, ratio in log_ratios.items():
        if not abs(ratio) <= limit:
            raise TrueupError(
                f"before any training the {side} answers are {ratio:+.4g} nats from the reference, and it "
                f"must be 0 (within {limit:.1g}): the reference is not the model that training starts from. "
                "Check ref_model_name_or_path; with precompute_ref_log_probs, delete the cache of datasets"
            )


def check_loss(measured: float, expected: float, slack: float, what: str) -> None:
    """Raises TrueupError where a loss is not what it must be at zero margin, within `slack`."""
    if not abs(measured - expected) <= slack:
        raise TrueupError(
            f"before any training the loss ({what}) is {measured:.6g}, and it must be {expected:.6g}: the "
            "trainer computes another loss than its name says; install the versions of constraints.txt, and "
            "report it"
        )


def check_log_probs(measured: Mapping[str, float], expected: Mapping[str, float], allowed: Allowed) -> None:
    """The loss and the model's own logits agree about the answers' log-probabilities (means, by side).

    Raises:
        TrueupError: they do not.
    """
    for side, value in expected.items():
        if not abs(measured[side] - value) <= 10 * (allowed.margin + allowed.share * abs(value)):
            raise TrueupError(
                f"the trainer takes the {side} answers for {measured[side]:.6g} nats, the model's logits say "
                f"{value:.6g}: something is still dropped in training mode, or the model changes its logits "
                "in a way that its config (logit_scale, final_logit_softcapping) does not tell; correct that"
            )
