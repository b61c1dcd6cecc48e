"""TRL's KTOTrainer as trueup uses it."""

from typing import Any

import torch
import trl

from trueup.preference.offline_trainer import OfflineTrainer


class KTOTrainer(OfflineTrainer, trl.KTOTrainer):
    """Kahneman-Tversky optimisation (https://arxiv.org/abs/2402.01306), of answers that are good or bad."""

    @property
    def loss_name(self) -> str:
        """Such as `kto`."""
        return self.loss_type

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        for metrics in self._metrics.values():
            if "kl" in metrics:  # the paper's z0, on wrong answers; `eval_kl` is the sampled one
                metrics["reference_point"] = metrics.pop("kl")
        return loss

    def mean_log_probs(
        self, answers: list[torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        good = inputs["label"].bool().cpu()
        sums = torch.tensor([float(one.double().sum()) for one in answers])
        sides = {"chosen": sums[good], "rejected": sums[~good]}
        counted = torch.tensor(
            [[float(one.sum()), len(one)] for one in sides.values()], device=self.args.device
        )
        total = self.accelerator.gather(counted[None]).sum(dim=0).tolist()
        return {side: both / count for side, (both, count) in zip(sides, total, strict=True) if count}

    def loss_at_start(self, answers: list[torch.Tensor], inputs: dict[str, Any]) -> float:
        """Every answer costs 1 - sigmoid(0), times the weight of its side."""
        good = float(inputs["label"].float().mean())
        return 0.5 * (good * self.desirable_weight + (1 - good) * self.undesirable_weight)
