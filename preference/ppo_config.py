"""`PPOConfig`: the keys of PPO, by TRL's names, on Transformers' TrainingArguments.

The unit of `max_steps`, `eval_steps`, `save_steps`, `logging_steps` and `warmup_steps` is the round: one
rollout of `per_device_train_batch_size * gradient_accumulation_steps` prompts on each device, and the updates
on it.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from trueup.base.stage import key


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `PPOTrainer`: all of TrainingArguments, and those of PPO.

    Raises:
        ValueError: values that PPO cannot work with; the message says why.
    """

    # Defaults of TrainingArguments that are wrong here.
    learning_rate: float = key(3e-6, "Peak learning rate of the policy.")
    adam_epsilon: float = key(1e-5, "Added to the root of AdamW's second moment; 1e-5 in all PPO baselines.")
    logging_steps: float = key(1, "Log every so many rounds.")
    remove_unused_columns: bool | None = key(False, "Other columns are for the reward functions: keep them.")

    trust_remote_code: bool = key(False, "Run Python code that a model directory brings along.")

    # How long, and on what
    total_episodes: int | None = key(
        None, "Completions to train on; excludes max_steps and, if given, overrides num_train_epochs."
    )
    response_length: int = key(53, "A completion of so many tokens is cut.")
    num_ppo_epochs: int = key(4, "Passes over the completions of a round.")
    num_mini_batches: int = key(1, "Optimizer steps in one such pass.")

    # Sampling. Anything but the policy's own distribution makes the KL wrong, in time negative.
    temperature: float = key(1.0, "Of sampling, and in every log-probability.")
    top_k: int = key(0, "Must be 0: PPO samples from the policy itself.")
    top_p: float = key(1.0, "Must be 1: PPO samples from the policy itself.")
    repetition_penalty: float = key(1.0, "Must be 1: PPO samples from the policy itself.")
    generation_backend: Literal["batched", "transformers"] = key(
        "batched",
        "batched: our sampler, which drops finished rows; transformers: `generate`, for models with a cache "
        "of their own kind.",
    )
    local_rollout_forward_batch_size: int = key(64, "Rows decoded together on each device.")

    # Reward
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each of reward_funcs; default: all 1."}
    )
    missing_eos_penalty: float | None = key(
        1.0, "Subtracted from the score of a completion that was cut before it ended."
    )
    whiten_rewards: bool = key(False, "Scale the rewards of a round to variance 1.")
    whiten_advantages: bool = key(True, "Bring the advantages of a round to mean 0 and variance 1.")

    # KL from the reference
    kl_coef: float = key(0.05, "Weight of the KL in the reward.")
    kl_estimator: Literal["k1", "k3"] = key("k1", "Estimator of the KL in the reward.")
    kl_controller: Literal["fixed", "adaptive"] = key(
        "fixed", "adaptive: moves kl_coef until the KL of completions is adaptive_kl_target."
    )
    adaptive_kl_target: float = key(6.0, "KL aimed at, in nats per completion, by kl_controller: adaptive.")
    adaptive_kl_horizon: int = key(10_000, "Episodes in which an error of 20 % moves kl_coef by about 20 %.")

    # Updates
    cliprange: float = key(0.2, "The probability ratio is clipped to 1 +- this.")
    target_kl: float | None = key(
        None, "A round's remaining epochs are left out when its approx_kl per token exceeds 1.5 times this."
    )
    gamma: float = key(1.0, "Discount per token.")
    lam: float = key(0.95, "GAE's lambda.")

    # Value model
    cliprange_value: float = key(0.2, "A value's change since the rollout is clipped to this.")
    vf_coef: float = key(0.1, "Weight of the value loss.")
    value_learning_rate: float | None = key(None, "Of the value model; default: learning_rate.")
    share_trunk: bool = key(
        False, "Values from a linear head on the policy's own trunk: half the cost, another algorithm."
    )

    # Evaluation
    max_eval_prompts: int = key(256, "Prompts sampled at each evaluation.")
    log_completions: bool = key(False, "Show a table of completions at each evaluation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("top_k", 0), ("top_p", 1), ("repetition_penalty", 1)):
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}: {getattr(self, name)} would not sample from the policy itself, and the KL "
                    f"would be wrong; the only value is {value}"
                )
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError("total_episodes: and max_steps both say how long to train; delete one")
        for name in ("temperature", "response_length", "num_ppo_epochs", "num_mini_batches"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if rows % self.num_mini_batches:
            raise ValueError(
                f"num_mini_batches: {self.num_mini_batches} does not divide the {rows} completions of a "
                "round on each device (per_device_train_batch_size * gradient_accumulation_steps)"
            )

    @property
    def episodes_per_round(self) -> int:
        """Completions in one round, on all devices."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
