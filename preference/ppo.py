"""The PPO stage: a fine-tuned language model learns to please a reward, held near to where it started."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trueup.base import adapters
from trueup.base.stage import key, load_model, load_tokenizer, set_up, trainer_config
from trueup.preference.ppo_config import PPOConfig
from trueup.preference.rewarded import RewardedRecipe, prompts_with_room, rewards_of, say_if_uncalibrated
from trueup.recipes.errors import TrueupError
from trueup.recipes.run import Run, is_main_process

if TYPE_CHECKING:
    from trueup.preference.ppo_trainer import PPOTrainer


@dataclass
class PPORecipe(RewardedRecipe, PPOConfig):
    """Optimise a language model against a reward by PPO. Steps are rounds of rollout and update."""

    on_alarm: str = key(
        "warn",
        "What a guard's alarm does: warn; stop; or rollback: stop, and publish the checkpoint before it.",
        choices=["warn", "stop", "rollback"],
    )
    eval_strategy: str = key(
        "steps", "When held-out prompts are sampled; no: never.", choices=["no", "steps"]
    )
    eval_steps: float | None = key(0.1, "Evaluate every so many rounds; below 1 a share of all.")
    save_steps: float = key(0.1, "Write a checkpoint every so many rounds; below 1 a share of all.")
    # Transformers' warm-up begins at a rate of 0, and a step is a whole round here: it would learn nothing.
    warmup_steps: float = key(0.0, "Rounds of linear warm-up; below 1 a share of all.")

    def __post_init__(self) -> None:
        set_up(self, PPOConfig)

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        counted = {"max_steps": 1} if "total_episodes" in given else {}  # a length, for the shared checks
        found = super().contradictions({**given, **counted})
        if "total_episodes" in given:
            found = [(name, message) for name, message in found if name != "num_train_epochs"]
            found += [
                (name, "and total_episodes both say how long to train; delete one")
                for name in ("max_steps", "num_train_epochs")
                if name in given
            ]
        if given.get("kl_controller", "fixed") == "fixed":
            found += [
                (name, "is read by kl_controller: adaptive alone; add that, or delete it")
                for name in ("adaptive_kl_target", "adaptive_kl_horizon")
                if name in given
            ]
        return found

    def run(self, run: Run) -> None:
        """Train, and publish the model directory."""
        from trueup.base.trainer import clear_checkpoints, fit
        from trueup.eval.guard_callback import GuardCallback

        guard = GuardCallback(on_alarm="warn" if self.on_alarm == "warn" else "stop")
        trainer = self.trainer(run.recipe.values, run.work_dir)
        trainer.add_callback(guard)
        start = run.parents["model_name_or_path"]
        adapters.assert_reference(trainer.policy, start)
        say_if_uncalibrated(trainer.rewards.scorers, "kl_coef")
        metrics = fit(trainer, run)
        if guard.alarms and self.on_alarm == "rollback":
            metrics["rolled_back_to"] = roll_back(trainer, guard.alarms[0].step)
        adapters.assert_reference(trainer.policy, start)
        publish(trainer, run, metrics | {"alarms": float(len(guard.alarms))})
        if is_main_process():
            clear_checkpoints(run.work_dir, self.keep_checkpoints == "evaluated")

    def trainer(self, values: dict[str, Any], work_dir: Path) -> "PPOTrainer":
        """The trainer, its prompts loaded.

        Args:
            values: the recipe's values.

        Raises:
            TrueupError: model, data or rewards do not fit.
        """
        from trueup.preference.ppo_trainer import PPOTrainer

        tokenizer, model = load_tokenizer(self), load_model(self)
        rows = {
            split: prompts_with_room(self, split, tokenizer, model, "response_length")
            for split in self._splits()
        }
        trainer = PPOTrainer(
            model=model,
            reward_funcs=rewards_of(values),
            args=trainer_config(PPOConfig, values, work_dir, **self.checkpoints_kept()),
            train_dataset=rows["train"],
            eval_dataset=rows.get("validation"),
            processing_class=tokenizer,
            peft_config=adapters.lora_config(self, model),
            scorers=self.scorers or [],
        )
        if is_main_process():
            args = trainer.args
            print(f"{args.max_steps:,} rounds of {args.episodes_per_round:,} completions", flush=True)
        return trainer


# -------------------------------------------------------------------------------------------------- saving


def roll_back(trainer: "PPOTrainer", alarm: int) -> int:
    """Load the newest checkpoint from before the round of an alarm; returns its round.

    Raises:
        TrueupError: there is none.
    """
    from trueup.base.trainer import checkpoints

    for path in checkpoints(Path(trainer.args.output_dir)):
        step = int(path.name.split("-")[1])
        if step < alarm:
            trainer._load_from_checkpoint(str(path))
            return step
    raise TrueupError(
        f"on_alarm: rollback: no checkpoint is older than the alarm of round {alarm}; lower save_steps"
    )


def publish(trainer: "PPOTrainer", run: Run, metrics: dict[str, float]) -> None:
    """Write the model directory: with LoRA the merged model, and the adapter in `adapter/`; and the traces.

    Raises:
        TrueupError: merging changed the model.
    """
    from trueup.base.trainer import save_model
    from trueup.eval.frontier import FRONTIER
    from trueup.preference.ppo_trace import PICTURE, draw

    weights = trainer.gathered_weights()
    if not is_main_process():
        return
    policy, tokenizer = trainer.policy, trainer.processing_class
    probe = {"input_ids": torch.arange(min(16, len(tokenizer)))[None]}

    def save(path: Path) -> None:
        if adapters.is_adapter(policy):
            policy.save_pretrained(path / "adapter")
            save_model(adapters.merge(policy, probe), tokenizer, path)
        else:
            save_model(policy, tokenizer, path, state_dict=weights)
        shutil.copy(run.work_dir / FRONTIER, path / FRONTIER)
        draw(trainer.state.log_history, path / PICTURE)

    run.publish(save, metrics, tokens=trainer.state.num_input_tokens_seen)
