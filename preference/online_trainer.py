"""TRL's RLOO and GRPO as trueup uses them: the critic-free cross-checks of PPO, on the same footing.

    trainer = RLOOTrainer(model, ["gold"], RLOOConfig(...), prompts, processing_class=tokenizer)
    trainer.train()

The algorithms are TRL's. What is the same as in PPO here: completions come from the batched sampler, each row
with random numbers of its own; rewards are scorers, read from the policy's own tokens; dropout is off.

TRL samples a *rollout* and then makes `rollout_steps` optimizer steps on it. It does not keep the rollout in
a checkpoint, so checkpoints lie between two rollouts only. There a resumed run is exact: the prompts' order
is a function of seed and epoch, the random numbers one of seed and rollout.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import trl
from accelerate.utils import gather
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from trueup.base.stage import key
from trueup.base.trainer import StageTrainer
from trueup.eval.rendering import encode_prompt, plain
from trueup.eval.sampler import SamplingSettings, eos_ids, evaluating, sample
from trueup.preference.ppo_rollout import Completions, Rewards, as_scorer, episode_keys
from trueup.preference.value import disable_dropout
from trueup.recipes.errors import UsageError

Tokens = list[int]
Row = dict[str, Any]


@dataclass
class OnlineConfig:
    """Keys beside TRL's, by the names they have in PPOConfig."""

    generation_backend: Literal["batched", "transformers"] = key(
        "batched",
        "batched: our sampler, which drops finished rows; transformers: TRL's own ways, `generate` or vLLM.",
    )
    local_rollout_forward_batch_size: int = key(64, "Rows decoded together on each device.")
    missing_eos_penalty: float | None = key(
        1.0, "Subtracted from the reward of a completion that was cut before it ended."
    )


@dataclass
class RLOOConfig(OnlineConfig, trl.RLOOConfig):
    """Arguments of `RLOOTrainer`."""


@dataclass
class GRPOConfig(OnlineConfig, trl.GRPOConfig):
    """Arguments of `GRPOTrainer`."""


def rollout_steps(args: Any) -> int:
    """Optimizer steps made on one rollout.

    Args:
        args: an RLOOConfig or GRPOConfig.

    Raises:
        UsageError: that is no whole number, or a checkpoint would lie within a rollout.
    """
    batches, accumulated = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    if batches % accumulated:
        raise UsageError(
            f"steps_per_generation: {args.steps_per_generation} x num_iterations {args.num_iterations} is "
            f"not a multiple of gradient_accumulation_steps {accumulated}, so a rollout would end within an "
            "optimizer step"
        )
    steps: int = batches // accumulated
    with_evaluations = args.save_strategy == "best" or getattr(args, "keep_checkpoints", "none") != "none"
    name = "eval_steps" if with_evaluations else "save_steps"
    every = getattr(args, name)
    if args.save_strategy in ("steps", "best") and every is not None and every >= 1 and every % steps:
        below = int(every // steps * steps)
        near = " or ".join(str(one) for one in (below, below + steps) if one)
        raise UsageError(
            f"{name}: {every:g} is not a multiple of {steps}, the optimizer steps on one rollout; a "
            f"checkpoint between two rollouts alone can be resumed from exactly: {near}"
        )
    return steps


class WholeRollouts(TrainerCallback):
    """Rounds `save_steps` and `eval_steps` that are shares of all steps up to whole rollouts.

    Attributes:
        stopping: whether training is to stop where the rollout ends.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopping = False
        for name in ("save_steps", "eval_steps"):
            if (getattr(args, name) or 1) < 1:
                setattr(state, name, math.ceil(getattr(state, name) / self.steps) * self.steps)


class PromptSampler(RepeatSampler):
    """TRL's, with an order that is a function of seed and epoch: TRL's own forgets the epoch on a resume."""

    def __init__(self, *args: Any, epoch: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


class OnlineTrainer(StageTrainer):
    """What RLOO and GRPO share. Put it before TRL's class.

    Args:
        model: a loaded causal language model; its directory is the reference, or under LoRA the model with
            the adapter switched off.
        reward_funcs: as PPOTrainer's: reward model directories, loaded ones, functions or names of them.
        args: the configuration.
        train_dataset, eval_dataset: rows with a `prompt`, a string or a conversation; their other columns are
            handed to the reward functions.
        processing_class: the tokenizer.

    Raises:
        UsageError: what the recipe must change.
    """

    control: Any
    reward_func_names: list[str]  # these and what follows are TRL's
    reward_weights: torch.Tensor
    ref_model: PreTrainedModel | None
    _dist: Any
    _log_completion_extra: Any
    _log_metric: Any

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: Sequence[Any],
        args: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        peft_config: Any = None,
    ) -> None:
        assert processing_class is not None
        self.rollout_steps = rollout_steps(args)
        self.precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
        scorers = [as_scorer(one, processing_class, args.device, self.precision) for one in reward_funcs]
        self.rewards = Rewards(scorers, processing_class, args.reward_weights)
        self.whole_rollouts = WholeRollouts(self.rollout_steps)
        self.stop = eos_ids(model, processing_class)
        wanted = args.generation_batch_size // args.num_generations
        if hasattr(train_dataset, "__len__") and len(train_dataset) < wanted:
            raise UsageError(
                f"per_device_train_batch_size: a rollout takes {wanted} prompts, and there are "
                f"{len(train_dataset)}; lower it, or steps_per_generation"
            )
        super().__init__(
            model=model,
            reward_funcs=scorers,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[self.whole_rollouts, *callbacks],
            peft_config=peft_config,
        )
        disable_dropout(self.model)
        if args.missing_eos_penalty:
            self.reward_func_names.append("missing_eos")
            self.reward_weights = torch.cat([self.reward_weights, torch.tensor([args.missing_eos_penalty])])

    # ------------------------------------------------------------------------------------- prompts to rewards

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        args = self.args
        return PromptSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=args.num_generations,
            batch_size=args.generation_batch_size // args.num_generations,
            repeat_count=args.num_iterations * args.steps_per_generation,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[Tokens], None, dict[str, Any]]:
        return [encode_prompt(self.processing_class, prompt) for prompt in prompts], None, {}

    def _sample(self, prompts: list[Tokens]) -> list[Tokens]:
        """A rollout's completions on this rank, the end-of-sequence token included."""
        args = self.args
        rollout = self.state.global_step // self.rollout_steps
        keys = episode_keys(rollout, args.process_index, args.world_size, len(prompts))
        settings = SamplingSettings(
            args.max_completion_length, args.temperature, args.top_k, args.top_p, args.seed,
            args.local_rollout_forward_batch_size,
        )  # fmt: skip
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator) as policy,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            found = sample(
                policy, self.processing_class, prompts, settings, keys=keys, autocast=self.precision
            )
        return [one.ids for one in found]

    def _calculate_rewards(
        self, inputs: list[Row], prompts: list[Any], completions: list[Any], completion_ids_list: list[Tokens]
    ) -> torch.Tensor:
        """What each reward says (B, rewards) of the completions of all ranks, as PPO reads it.

        The last is `missing_eos`, if it costs anything: -1 for a completion that was cut.
        """
        tokenizer = self.processing_class
        done = Completions(
            inputs,
            [encode_prompt(tokenizer, prompt) for prompt in prompts],
            completion_ids_list,
            [plain(completion) for completion in completions],
            [ids[-1] in self.stop for ids in completion_ids_list],
        )
        extra = {
            "trainer_state": self.state,
            "log_extra": self._log_completion_extra,
            "log_metric": self._log_metric,
        }
        said = torch.stack([self.rewards.score(one, done, **extra) for one in self.rewards.scorers], dim=1)
        if self.args.missing_eos_penalty:
            cut = -(~torch.tensor(done.ended)).double()
            # A row that no reward has a word for stays one: TRL leaves it out.
            cut[said.isnan().all(dim=1)] = math.nan
            said = torch.cat([said, cut[:, None]], dim=1)
        gathered: torch.Tensor = gather(said.float().to(self.accelerator.device))
        return gathered

    # ------------------------------------------------------------------------------------ Trainer's own hooks

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What ValidationCallback measures; TRL would sample in groups, to give a loss that says nothing."""
        metrics: dict[str, float] = {}
        with evaluating(self.model):  # or TRL's `log` would take the figures for those of training
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _within_rollout(self) -> bool:
        step = self.state.global_step
        return step % self.rollout_steps > 0 and step < self.state.max_steps

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Asked to stop within a rollout, by a signal or a guard, it goes on to the end of that rollout."""
        within, rollouts = self._within_rollout(), self.whole_rollouts
        if rollouts.stopping and not within and not self.control.should_training_stop:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        rollouts.stopping |= self.control.should_training_stop
        self.control.should_training_stop = rollouts.stopping and not within

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if not self._within_rollout():
            super()._save_checkpoint(*args, **kwargs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Not here: a step's inputs are prompts, and TRL counts the tokens of its rollouts itself."""


class RLOOTrainer(OnlineTrainer, trl.RLOOTrainer):
    """REINFORCE with the other completions of a prompt as baseline (https://arxiv.org/abs/2402.14740)."""

    def _generate_single_turn(self, prompt_ids: list[Tokens], *args: Any, **kwargs: Any) -> list[Tokens]:
        if self.args.generation_backend == "transformers":
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self._sample(prompt_ids)


class GRPOTrainer(OnlineTrainer, trl.GRPOTrainer):
    """PPO's clipped loss with advantages relative to a prompt's group (https://arxiv.org/abs/2402.03300)."""

    def _generate_single_turn(
        self, prompt_ids: list[Tokens], *args: Any, **kwargs: Any
    ) -> tuple[list[Tokens], Any]:
        if self.args.generation_backend == "transformers":
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self._sample(prompt_ids), None
