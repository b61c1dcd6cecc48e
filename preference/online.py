"""The RLOO and GRPO stages: PPO's critic-free cross-checks, by the same recipe on TRL's trainers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from trueup.base import adapters
from trueup.base.stage import key, load_model, load_tokenizer, set_up, trainer_config
from trueup.eval.validation import (
    Validation,
    ValidationCallback,
    frozen_prompts,
    open_scorers,
)
from trueup.preference.online_trainer import (
    GRPOConfig,
    GRPOTrainer,
    OnlineTrainer,
    RLOOConfig,
    RLOOTrainer,
    rollout_steps,
)
from trueup.preference.rewarded import (
    RewardedRecipe,
    prompts_with_room,
    rewards_of,
    say_if_uncalibrated,
)
from trueup.recipes.run import Run, is_main_process

# What only `generate` or vLLM reads.
_TRL_SAMPLING = (
    "min_p", "repetition_penalty", "generation_kwargs", "cache_implementation", "use_vllm",
    "use_transformers_continuous_batching",
)  # fmt: skip


@dataclass
class OnlineRecipe(RewardedRecipe):
    """Keys and run of both stages."""

    save_steps: float = key(
        0.1, "Write a checkpoint every so many steps, whole rollouts; below 1 a share of all."
    )

    config_class: ClassVar[type]
    trainer_class: ClassVar[type[OnlineTrainer]]

    def __post_init__(self) -> None:
        set_up(self, self.config_class)
        rollout_steps(self)

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        found = super().contradictions(given)
        if given.get("generation_backend", "batched") == "batched":
            found += [
                (name, "is read with generation_backend: transformers; add that, or delete it")
                for name in _TRL_SAMPLING
                if given.get(name)
            ]
        found += [
            (name, why)
            for name, why in (
                ("num_generations_eval", "has no effect: evaluations sample each prompt once; delete it"),
                ("sync_ref_model", "moves the reference, which no checkpoint keeps; delete it"),
                ("chat_template_kwargs", "is not handed on: the chat template is taken as it is; delete it"),
            )
            if given.get(name)
        ]
        if "max_completion_length" in given and not given["max_completion_length"]:
            found.append(("max_completion_length", "must be a number of tokens above 0"))
        return found

    def run(self, run: Run) -> None:
        """Train, and publish the model directory."""
        from trueup.base.trainer import fit, publish
        from trueup.eval.frontier import FRONTIER, FrontierCallback
        from trueup.eval.guard_callback import GuardCallback

        trainer = self.trainer(run.recipe.values, run.work_dir)
        guard = GuardCallback(on_alarm="stop" if self.on_alarm == "stop" else "warn")
        for callback in (guard, FrontierCallback(run.work_dir)):
            trainer.add_callback(callback)
        start = run.parents["model_name_or_path"]
        policy = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        adapters.assert_reference(policy, start)
        say_if_uncalibrated(trainer.rewards.scorers, "beta")
        metrics = fit(trainer, run)
        adapters.assert_reference(policy, start)
        probe = {"input_ids": torch.arange(min(16, len(trainer.processing_class)))[None]}
        metrics["alarms"] = float(len(guard.alarms))
        keep = self.keep_checkpoints == "evaluated"
        publish(trainer, run, metrics, probe, beside=[run.work_dir / FRONTIER], keep_models=keep)

    def trainer(self, values: dict[str, Any], work_dir: Path) -> OnlineTrainer:
        """The trainer, its prompts loaded.

        Args:
            values: the recipe's values.

        Raises:
            TrueupError: model, data or rewards do not fit.
        """
        tokenizer, model = load_tokenizer(self), load_model(self)
        rows = {
            split: prompts_with_room(self, split, tokenizer, model, "max_completion_length")
            for split in self._splits()
        }
        # Completions are shown by our evaluation; TRL would show those of training at every line of the log.
        shown = {"log_completions": False, "num_generations_eval": 1}
        args = trainer_config(self.config_class, values, work_dir, **shown, **self.checkpoints_kept())
        trainer = self.trainer_class(
            model=model,
            reward_funcs=rewards_of(values),
            args=args,
            train_dataset=rows["train"],
            eval_dataset=rows.get("validation"),
            processing_class=tokenizer,
            peft_config=adapters.lora_config(self, model),
        )
        if "validation" in rows:
            trainer.add_callback(self._validation(trainer, rows["validation"], tokenizer))
        if is_main_process():
            each = f"{args.generation_batch_size:,} completions, {args.num_generations} of each prompt"
            print(f"rollouts of {each}; {trainer.rollout_steps} optimizer steps on one", flush=True)
        return trainer

    def _validation(self, trainer: OnlineTrainer, rows: Any, tokenizer: Any) -> ValidationCallback:
        length = trainer.args.max_completion_length
        validation = Validation(
            frozen_prompts(rows, self.max_eval_prompts, tokenizer, None, length),
            tokenizer,
            open_scorers(self.scorers, trainer.args),
            max_new_tokens=length,
        )
        reference: Any = trainer.ref_model
        if reference is None and not self.use_peft:  # with beta 0 the trainer keeps none
            reference = load_model(self).eval().to(trainer.args.device)
        return ValidationCallback(trainer, validation, reference, show=self.log_completions)


@dataclass
class RLOORecipe(OnlineRecipe, RLOOConfig):
    """Optimise a language model against a reward by RLOO: no critic, the other replies are the baseline."""

    config_class: ClassVar[type] = RLOOConfig
    trainer_class: ClassVar[type[OnlineTrainer]] = RLOOTrainer


@dataclass
class GRPORecipe(OnlineRecipe, GRPOConfig):
    """Optimise a language model against a reward by GRPO: no critic, replies are compared in their group."""

    # TRL's 0 leaves the KL free, and a reward model is soon overrated; RLOO's default.
    beta: float = key(0.05, "Weight of the KL from the reference in the loss.")

    config_class: ClassVar[type] = GRPOConfig
    trainer_class: ClassVar[type[OnlineTrainer]] = GRPOTrainer
