"""AdamW, or Muon for the matrices inside the blocks and AdamW for the rest."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

OPTIMIZERS = ("adamw_torch_fused", "muon")


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters in three groups: `hidden`, `head` and `plain`.

    hidden: the matrices inside the blocks: decayed, and what Muon is for.
    head: an output matrix of its own (untied): decayed.
    plain: embeddings, norms and biases: not decayed. A decayed norm only undoes what the next matrix learns,
        and decay would pull the embeddings of rare tokens to zero between two sightings.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "head": [], "plain": []}
    for name, parameter in model.named_parameters():  # a tied matrix appears once
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim == 2 and id(parameter) not in embeddings
        kind = "plain" if not matrix else "hidden" if ".layers." in f".{name}" else "head"
        groups[kind].append(parameter)
    return groups


def build_optimizers(
    model: nn.Module,
    kind: str,
    learning_rate: float,
    muon_learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
    hidden_scale: float = 1.0,
) -> list[Optimizer]:
    """One AdamW, or a Muon and an AdamW. Each group keeps its peak rate as `peak_lr` for `set_learning_rate`.

    `hidden_scale` multiplies AdamW's rate of the matrices inside the blocks: with muP, (width tuned) / width,
    for a step moves a sum over the width the more, the more terms it has (https://arxiv.org/abs/2203.03466,
    table 8). Muon's steps have that in their norm.

    Muon makes the update of a matrix orthogonal, so all its directions learn equally fast
    (https://kellerjordan.github.io/posts/muon/); that means nothing for embeddings, heads and vectors.
    """
    groups = parameter_groups(model)
    hidden = groups["hidden"] if kind == "adamw_torch_fused" else []
    apart = hidden if hidden_scale != 1 else []
    adamw = AdamW(
        _without_empty(
            {"params": groups["head"] + ([] if apart else hidden), "weight_decay": weight_decay},
            # Decay is multiplied with the rate: so it stays what it was.
            {
                "params": apart,
                "weight_decay": weight_decay / hidden_scale,
                "lr": learning_rate * hidden_scale,
            },
            {"params": groups["plain"], "weight_decay": 0.0},
        ),
        lr=learning_rate,
        betas=betas,
        eps=epsilon,
        fused=True,
    )
    optimizers: list[Optimizer] = [adamw]
    if kind == "muon":
        optimizers.append(Muon(groups["hidden"], lr=muon_learning_rate, weight_decay=weight_decay))
    for group in _groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def _without_empty(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def _groups(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def set_learning_rate(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Each group's learning rate = its peak times the schedule's factor."""
    for group in _groups(optimizers):
        group["lr"] = group["peak_lr"] * factor
