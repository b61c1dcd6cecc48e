"""TRL's DPOTrainer as trueup uses it."""

from typing import Any

import torch
import trl

from trueup.preference.dpo_checks import expected_loss
from trueup.preference.offline_trainer import OfflineTrainer


class DPOTrainer(OfflineTrainer, trl.DPOTrainer):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290) and the losses that came after it."""

    @property
    def loss_name(self) -> str:
        """Such as `sigmoid + 0.1 sft`."""
        pairs = zip(self.loss_types, self.loss_weights, strict=True)
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in pairs)

    def mean_log_probs(
        self, answers: list[torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        half = len(answers) // 2
        sums = torch.tensor([float(one.double().sum()) for one in answers], dtype=torch.float64)
        if (
            self.ld_alpha is not None
        ):  # https://arxiv.org/abs/2409.06411: what is beyond the shorter side counts less
            shared = [min(len(a), len(b)) for a, b in zip(answers[:half], answers[half:], strict=True)] * 2
            heads = torch.tensor(
                [float(one[:n].double().sum()) for one, n in zip(answers, shared, strict=True)]
            )
            sums = heads + self.ld_alpha * (sums - heads)
        means = torch.stack([sums[:half].mean(), sums[half:].mean()]).float().to(self.args.device)
        chosen, rejected = self.accelerator.gather(means[None]).mean(dim=0).tolist()
        return {"chosen": chosen, "rejected": rejected}

    def loss_at_start(self, answers: list[torch.Tensor], inputs: dict[str, Any]) -> float:
        chosen = answers[: len(answers) // 2]
        return expected_loss(self.loss_types, self.loss_weights, self.beta, self.label_smoothing, chosen)
