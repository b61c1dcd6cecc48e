"""`PPOTrainer`: reinforcement learning from a reward, on Transformers' Trainer.

    trainer = PPOTrainer("runs/sft", reward_funcs="runs/reward", args=PPOConfig(...), train_dataset=prompts)
    trainer.train()

One step of Trainer is one *round*, in `training_step`:

    1. sample a completion for each prompt                            (ppo_rollout.py)
    2. score it; log-probabilities of policy and reference, values    (ppo_rollout.py, value.py)
    3. rewards, advantages                                            (ppo_math.py)
    4. num_ppo_epochs x num_mini_batches optimizer steps              (ppo_math.py)

The last of these optimizer steps is left to Trainer's own loop, which then steps the learning rate, logs,
evaluates, and saves: so all its steps are rounds, and a checkpoint always lies between two of them. Nothing
in a round draws from a global random number generator, so what is resumed goes on bit by bit.
"""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from trueup.base.adapters import is_adapter
from trueup.base.device import bound_kernel_caches
from trueup.base.trainer import StageTrainer
from trueup.eval.kl import kl_of_samples
from trueup.eval.pathologies import pathologies
from trueup.eval.rendering import encode_prompt
from trueup.eval.sampler import Sample, eos_ids
from trueup.eval.validation import frozen_prompts, save_table
from trueup.preference.ppo_config import PPOConfig
from trueup.preference.ppo_math import (
    KLController,
    explained_variance,
    gae_advantages,
    kl_estimate,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from trueup.preference.ppo_rollout import (
    Completions,
    EpisodeSampler,
    Generator,
    Rewards,
    Rollout,
    Row,
    as_scorer,
    episode_keys,
    mini_batches,
)
from trueup.preference.ppo_setup import (
    actor_critic,
    checked_tokenizer,
    default_generator,
    set_rounds,
)
from trueup.preference.ppo_trace import TraceCallback
from trueup.preference.value import ActorCritic, ValueModel
from trueup.recipes.directory import read_json, write_json
from trueup.recipes.errors import UsageError

RewardFunction: TypeAlias = str | PreTrainedModel | Callable[..., Any]

VALUE_MODEL = "value_model.safetensors"
PPO_STATE = "ppo_state.json"

# Mean figures of the updates, over all completion tokens of all epochs of a round.
UPDATE_FIGURES = (
    "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
    "val/clipfrac_avg", "val/ratio",
)  # fmt: skip


class PPOTrainer(StageTrainer):
    """PPO for language models (https://arxiv.org/abs/1909.08593, https://arxiv.org/abs/2203.02155).

    Args:
        model: a model directory or Hub id, or a loaded causal language model. It is also the
            reference: copied, or under LoRA the model with the adapter switched off.
        reward_funcs: a reward model's directory, a loaded reward model, a function
            `(prompts, completions, **columns) -> list[float]` or the name of one, or a list of these.
        args: the configuration.
        train_dataset, eval_dataset: rows with a `prompt`, a string or a conversation; their other columns are
            handed to the reward functions.
        processing_class: the tokenizer; default: that of the model's directory.
        callbacks: further callbacks.
        peft_config: trains this LoRA adapter instead of the model.
        scorers: what else is measured at each evaluation, and not trained on; the first is `eval_score`.
        generator: what samples the completions, instead of `args.generation_backend`.

    Raises:
        UsageError: model, tokenizer, data and reward functions that PPO cannot work with.
    """

    control: Any
    optimizer: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        scorers: Sequence[RewardFunction] = (),
        generator: Generator | None = None,
    ) -> None:
        # Every epoch of a round comes back to the same 90 shapes or so, whose kernels take 1 to 2 ms each to
        # make: with 32 kept, a fifth of a round in bf16.
        bound_kernel_caches(96)
        args = args or PPOConfig(f"{Path(str(model)).name}-PPO" if isinstance(model, str) else "ppo")
        if isinstance(model, str):
            trust = {"trust_remote_code": args.trust_remote_code}
            processing_class = processing_class or AutoTokenizer.from_pretrained(model, **trust)
            model = AutoModelForCausalLM.from_pretrained(model, **trust)
        set_seed(args.seed)  # an adapter and a new head begin at random
        tokenizer = checked_tokenizer(processing_class, model)
        set_rounds(args, train_dataset)

        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)

        def scorer(function: RewardFunction, place: str) -> Any:
            return as_scorer(function, tokenizer, args.device, precision, place)

        functions = _listed(reward_funcs)
        self.rewards = Rewards([scorer(f, "reward_funcs") for f in functions], tokenizer, args.reward_weights)
        self.scorers = [scorer(f, "scorers") for f in _listed(scorers)]
        self.stop = frozenset(eos_ids(model, tokenizer))
        self.generator = generator or default_generator(args, tokenizer, self.stop, precision)
        target = args.adaptive_kl_target if args.kl_controller == "adaptive" else None
        self.kl_controller = KLController(args.kl_coef, target, args.adaptive_kl_horizon)
        self.precision = precision
        trained, self.reference = actor_critic(model, self.rewards.reward_model(), args, peft_config)
        self._prompts: list[Row] = []  # of the round that is being collected
        self._figures: dict[str, list[float]] = defaultdict(list)  # since the last log
        super().__init__(
            model=trained,
            args=args,
            data_collator=_as_they_are,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[TraceCallback(Path(args.output_dir)), *(callbacks or [])],
        )
        if self.reference is not None:
            self.reference = self._prepared_reference(self.reference)

    @property
    def actor_critic(self) -> ActorCritic:
        """The trained module without what DDP and autocast put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def policy(self) -> Any:
        """The policy: a PreTrainedModel, or with LoRA a PeftModel."""
        return self.actor_critic.policy

    @property
    def value_model(self) -> ValueModel:
        """The value model."""
        value = self.actor_critic.value
        assert value is not None
        return value

    def _prepared_reference(self, reference: ActorCritic) -> ActorCritic:
        """On the device, with the same autocast as the policy; sharded where the policy is."""
        if self.is_fsdp_enabled:
            from trl.models.utils import prepare_fsdp

            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    # ---------------------------------------------------------------------------------------------- the round

    def training_step(
        self, model: nn.Module, inputs: list[Row], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Collect prompts; with the last of `gradient_accumulation_steps` batches, the round they are for.

        Returns:
            The mean loss of the round's updates.

        Raises:
            TrueupError: the loss is not finite.
        """
        self._prompts += inputs
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        rows, self._prompts = self._prompts, []
        if self.state.global_step == 0 and self.args.eval_strategy != "no":
            self.evaluate()  # where it starts from
        model.train(self.args.activation_checkpointing)  # else not: dropout is off, and nothing else differs
        rollout = self._roll_out(model, rows)
        loss = self._update(model, rollout)
        if not loss.isfinite():
            raise self._not_finite(f"the loss is {loss.item()}")
        return loss

    def _roll_out(self, model: nn.Module, rows: list[Row]) -> Rollout:
        """Sample, score, and work out what the updates need."""
        args = self.args
        keys = episode_keys(self.state.global_step, args.process_index, args.world_size, len(rows))
        completions = self._complete(rows, keys, args.temperature)
        scores, by_scorer = self.rewards(completions, trainer_state=self.state)
        ended = torch.tensor(completions.ended)
        penalised = scores - (args.missing_eos_penalty or 0.0) * ~ended

        rollout = Rollout.empty(completions, args.device)
        self._measure(model, rollout)
        mask = rollout.mask
        kl = kl_estimate(rollout.log_probs, rollout.reference_log_probs, args.kl_estimator)
        penalty = self.kl_controller.coef
        rewards = token_rewards(penalised.float().to(mask.device), kl, mask, penalty)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, total=self._total)
        advantages, rollout.returns = gae_advantages(rewards, rollout.values, mask, args.gamma, args.lam)
        self._log_rollout(rollout, scores, penalised, by_scorer, kl)
        white = args.whiten_advantages
        rollout.advantages = whiten(advantages, mask, total=self._total) if white else advantages
        return rollout

    def _complete(self, rows: list[Row], keys: Sequence[int], temperature: float) -> Completions:
        """Completions of prompts, cut at their end-of-sequence token."""
        tokenizer = self.processing_class
        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
        with self.language_model() as policy:
            ids = self.generator(policy, prompts, keys, temperature)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Completions(rows, prompts, ids, texts, [one[-1] in self.stop for one in ids])

    @contextlib.contextmanager
    def language_model(self) -> Iterator[Any]:
        """The policy to sample from: with FSDP its parameters are put together meanwhile."""
        if not self.is_fsdp_enabled:
            yield self.policy
            return
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.model_wrapped, writeback=False):
            yield self.policy

    @torch.no_grad()
    def _measure(self, model: nn.Module, rollout: Rollout) -> None:
        """Log-probabilities of policy and reference, and values, by the very forward that is trained.

        In the very micro-batches too, so that the first ratio is exactly 1: the sampler's own
        log-probabilities differ by rounding.
        """
        for rows in self._micro_batches(rollout, range(len(rollout.completions))):
            batch = rollout.batch(rows, self.processing_class.pad_token_id)
            ours = model(**batch)
            with self._reference_of(model) as reference:
                theirs = reference(**batch, with_values=False)
            width = ours.log_probs.shape[1]
            rollout.log_probs[rows, :width] = ours.log_probs.float()
            rollout.entropy[rows, :width] = ours.entropy.float()
            rollout.values[rows, :width] = ours.values.float()
            rollout.reference_log_probs[rows, :width] = theirs.log_probs.float()

    @contextlib.contextmanager
    def _reference_of(self, model: nn.Module) -> Iterator[nn.Module]:
        if self.reference is not None:
            yield self.reference
        else:
            with self.policy.disable_adapter():
                yield model

    # -------------------------------------------------------------------------------------------- the updates

    def _update(self, model: nn.Module, rollout: Rollout) -> torch.Tensor:
        """The optimizer steps of a round but the last, whose gradients Trainer's own loop applies."""
        args = self.args
        order = torch.Generator().manual_seed(args.seed + 1_000_003 * self.state.global_step)
        sums = torch.zeros(len(UPDATE_FIGURES) + 1, device=args.device)
        waiting = False
        for _ in range(args.num_ppo_epochs):
            before = sums.clone()
            for rows in mini_batches(len(rollout.completions), args.num_mini_batches, order):
                if waiting:
                    self._step(model)
                sums += self._accumulate(model, rollout, rows)
                waiting = True
            if args.target_kl is not None:
                epoch = self._total(sums - before)
                if epoch[UPDATE_FIGURES.index("policy/approxkl_avg")] / epoch[-1] > 1.5 * args.target_kl:
                    break
        sums = self._total(sums)
        means = dict(zip(UPDATE_FIGURES, (sums[:-1] / sums[-1]).tolist(), strict=True))
        self._note(means)
        loss = means["loss/policy_avg"] + args.vf_coef * means["loss/value_avg"]
        return torch.tensor(loss, device=args.device)

    def _step(self, model: nn.Module) -> None:
        """One optimizer step, as Trainer makes them."""
        norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(model, grad_norm=norm)  # raises where it is not finite
        self.optimizer.step()
        model.zero_grad()

    def _accumulate(self, model: nn.Module, rollout: Rollout, rows: Sequence[int]) -> torch.Tensor:
        """Add the gradient of one mini-batch, micro-batch by micro-batch.

        The loss is the mean over the mini-batch's tokens on all ranks, however they fall into micro-batches.

        Returns:
            The sums over this rank's tokens of UPDATE_FIGURES, and their number.
        """
        args = self.args
        tokens = self._total(rollout.mask[list(rows)].sum())
        parts = self._micro_batches(rollout, rows)
        # One after the other: the policy's activations are gone before those of the value model come. What
        # DDP and FSDP wrap wants one forward for both.
        apart = isinstance(model, ActorCritic) and self.value_model.trunk is not None
        sums = torch.zeros(len(UPDATE_FIGURES) + 1, device=args.device)
        for part in parts:
            with self._synchronising(model, part is parts[-1]):
                batch = rollout.batch(part, self.processing_class.pad_token_id)
                found = model(**batch, with_values=not apart)
                here = (part, slice(found.log_probs.shape[1]))
                mask, old = rollout.mask[here], rollout.log_probs[here]
                policy = policy_loss(found.log_probs, old, rollout.advantages[here], mask, args.cliprange)
                loss, values = policy.loss.sum(), found.values
                if apart:
                    self._backward(loss / tokens)
                    with self.accelerator.autocast():
                        loss, values = torch.zeros_like(loss), self.actor_critic.values(**batch)
                value = value_loss(
                    values, rollout.values[here], rollout.returns[here], mask, args.cliprange_value
                )
                self._backward((loss + args.vf_coef * value.loss.sum()) / tokens)
            approx_kl = kl_estimate(old, found.log_probs.detach(), "k3") * mask
            figures = [policy.loss, value.loss, approx_kl, policy.clipped, found.entropy]
            figures += [value.clipped, policy.ratio, mask]
            sums += torch.stack([figure.detach().sum().float() for figure in figures])
        return sums

    def _backward(self, loss: torch.Tensor) -> None:
        # DDP, FSDP and DeepSpeed average over the ranks, and the sum is meant.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss * self.args.world_size, **options)

    def _micro_batches(self, rollout: Rollout, rows: Sequence[int]) -> list[list[int]]:
        return rollout.micro_batches(rows, self.args.per_device_train_batch_size)

    @contextlib.contextmanager
    def _synchronising(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Gradients cross ranks with the last micro-batch alone."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
            yield

    def _total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        total: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        return total

    # ------------------------------------------------------------------------------------------------ figures

    def _log_rollout(
        self,
        rollout: Rollout,
        scores: torch.Tensor,
        penalised: torch.Tensor,
        by_scorer: dict[str, torch.Tensor],
        kl: torch.Tensor,
    ) -> None:
        """Figures of a rollout, over all ranks; moves the KL controller."""
        mask = rollout.mask
        k1 = kl_estimate(rollout.log_probs, rollout.reference_log_probs, "k1")
        non_score = (-self.kl_controller.coef * kl).sum(dim=1).cpu()
        ended = torch.tensor(rollout.completions.ended)
        per_row = {
            "objective/kl": k1.sum(dim=1),
            "objective/entropy": -rollout.log_probs.sum(dim=1),
            "objective/scores": scores,
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": non_score + penalised,
            "completions/mean_length": mask.sum(dim=1),
            "completions/clipped_ratio": ~ended,
            **({f"rewards/{name}": said.nan_to_num() for name, said in by_scorer.items()}),
        }
        rows = self._total(torch.tensor(float(len(scores)), device=mask.device))
        sums = self._total(torch.stack([x.to(mask.device, torch.float).sum() for x in per_row.values()]))
        figures = dict(zip(per_row, (sums / rows).tolist(), strict=True))
        k3 = kl_estimate(rollout.log_probs, rollout.reference_log_probs, "k3").sum()
        tokens = figures["completions/mean_length"] * float(rows)
        figures |= {
            "objective/kl_k3": float(self._total(k3)) / tokens,
            "objective/kl_coef": self.kl_controller.coef,
            "val/num_eos_tokens": round((1 - figures["completions/clipped_ratio"]) * float(rows)),
            "val/explained_variance": explained_variance(rollout.values, rollout.returns, mask, self._total),
        }
        self._note({name: figure for name, figure in figures.items() if not math.isnan(figure)})
        self.kl_controller.update(figures["objective/kl"], round(float(rows)))
        self.state.num_input_tokens_seen += round(tokens)

    def _note(self, figures: dict[str, float]) -> None:
        for name, figure in figures.items():
            self._figures[name].append(figure)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Not here: a step's inputs are prompts. `_log_rollout` counts the tokens that are trained on."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; with the training loss go the means of all figures since the last time."""
        episodes = self.state.global_step * self.args.episodes_per_round
        if not isinstance(self.train_dataset, IterableDataset) and self.train_dataset is not None:
            self.state.epoch = episodes / len(self.train_dataset)  # Trainer's is the share of all rounds
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._figures.items()}
            logs["episode"] = episodes
            if start_time is not None:
                rounds = self.state.global_step - self._initial_global_step
                logs["eps"] = rounds * self.args.episodes_per_round / (time.time() - start_time)
            self._figures.clear()
        super().log(logs, start_time)

    # --------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample on held-out prompts, always the same ones with the same random numbers.

        Returns:
            reward (of the raw text, nothing subtracted), kl and kl_stderr (nats per completion, sampled at
            temperature 1), `score` and `scorers/*` where there are scorers, length and pathologies.

        Raises:
            UsageError: there are no held-out prompts.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise UsageError("eval_dataset: evaluation needs held-out prompts, and there are none")
        if isinstance(dataset, dict):
            parts = [self.evaluate(d, ignore_keys, f"{metric_key_prefix}_{n}") for n, d in dataset.items()]
            return {name: figure for part in parts for name, figure in part.items()}
        args = self.args
        context = getattr(self.policy.config.get_text_config(), "max_position_embeddings", None)
        tokenizer = self.processing_class
        rows = frozen_prompts(dataset, args.max_eval_prompts, tokenizer, context, args.response_length)
        table = self._sampled_table(rows)
        samples = [entry.pop("sample") for entry in table]
        reference = getattr(self.reference, "policy", None)
        kl = kl_of_samples(self.policy, reference, samples, autocast=self.precision)
        figures = {
            name: _mean(entry[name] for entry in table)
            for name in table[0]
            if name not in ("prompt", "completion")
        }
        if self.scorers:
            figures["score"] = figures[f"scorers/{self.scorers[0].name}"]
        figures |= {"kl": kl.per_sequence, "kl_stderr": kl.stderr, **pathologies(samples)}
        known = {name: figure for name, figure in figures.items() if not math.isnan(figure)}
        metrics = {f"{metric_key_prefix}_{name}": figure for name, figure in known.items()}
        if self.is_world_process_zero():
            save_table(table, Path(args.output_dir), self.state.global_step, args.log_completions)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sampled_table(self, rows: list[Row]) -> list[dict[str, Any]]:
        """One entry for each prompt: completion, reward, what the scorers say, and the sample itself.

        Each rank samples and scores its share, and gets the whole table.
        """
        mine = range(self.args.process_index, len(rows), self.args.world_size)
        completions = self._complete([rows[row] for row in mine], mine, temperature=1.0)
        said = {"reward": self.rewards(completions, trainer_state=self.state)[0]}
        said |= {f"scorers/{s.name}": self.rewards.score(s, completions) for s in self.scorers}
        table = [
            {
                "prompt": completions.rows[i]["prompt"],
                "completion": completions.texts[i],
                **{name: float(values[i]) for name, values in said.items()},
                "sample": Sample(
                    completions.prompts[i], completions.ids[i], completions.texts[i], completions.ended[i]
                ),
            }
            for i in range(len(completions))
        ]
        return gather_object(table)

    # ------------------------------------------------------------------------------------ Trainer's own hooks

    def _get_train_sampler(self, train_dataset: Any = None) -> EpisodeSampler:
        args = self.args
        return EpisodeSampler(len(self.train_dataset), args.max_steps * args.episodes_per_round, args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One optimizer; policy and value model each with a learning rate of its own."""
        if self.optimizer is None:
            module = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, module)
            decayed = set(self.get_decay_parameter_names(module))
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    part = next(part for part in name.split(".") if part in ("policy", "value"))
                    groups[part == "value", name in decayed].append(parameter)
            policy_rate, value_rate = self.args.learning_rate, self.args.value_learning_rate
            rates = {False: policy_rate, True: policy_rate if value_rate is None else value_rate}
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": rates[is_value],
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                    }
                    for (is_value, decays), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The policy, as a model directory of its own; with LoRA the adapter."""
        if not self.args.should_save:
            return
        path = output_dir or self.args.output_dir
        self.policy.save_pretrained(path, state_dict=_of_policy(state_dict))
        self.processing_class.save_pretrained(path)

    def gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """The policy's weights where they are sharded, put together; call it on all ranks. Else None."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        return _of_policy(self.accelerator.get_state_dict(self.model_wrapped))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """What a checkpoint holds beside the policy."""
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        write_json(Path(output_dir) / PPO_STATE, {"kl_coef": self.kl_controller.coef})
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:  # these have it in their shards
            save_file(self.value_model.state_dict(), Path(output_dir) / VALUE_MODEL)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.kl_controller.coef = read_json(Path(checkpoint) / PPO_STATE)["kl_coef"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = Path(resume_from_checkpoint)
        if is_adapter(self.policy):
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.policy, load_peft_weights(str(path), device="cpu"))
        else:
            weights = {
                k: v for file in sorted(path.glob("model*.safetensors")) for k, v in load_file(file).items()
            }
            self.policy.load_state_dict(weights, strict=False)  # a tied matrix is stored once
        self.value_model.load_state_dict(load_file(path / VALUE_MODEL))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _of_policy(weights: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    if weights is None:
        return None
    return {n.removeprefix("policy."): w for n, w in weights.items() if n.startswith("policy.")}


def _listed(functions: Any) -> list[Any]:
    return list(functions) if isinstance(functions, list | tuple) else [functions]


def _as_they_are(rows: list[Row]) -> list[Row]:
    """The data collator: prompts are encoded where they are sampled from."""
    return rows


def _mean(numbers: Iterable[float]) -> float:
    """Of those that are not nan."""
    known = [number for number in numbers if not math.isnan(number)]
    return sum(known) / len(known) if known else math.nan
