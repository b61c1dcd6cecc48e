"""What `PPOTrainer` checks and builds before it starts."""

import copy
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trueup.base.adapters import is_adapter
from trueup.preference.ppo_config import PPOConfig
from trueup.preference.ppo_rollout import BatchedGenerator, Generator, TransformersGenerator
from trueup.preference.value import ActorCritic, ValueModel, disable_dropout
from trueup.recipes.errors import UsageError


def checked_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> PreTrainedTokenizerBase:
    """The tokenizer, by default that of the model's directory.

    Raises:
        UsageError: it has no eos token, or no pad token of its own.
    """
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    if tokenizer.eos_token_id is None:
        raise UsageError("processing_class: the tokenizer has no eos token, so no completion could ever end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UsageError(
            "processing_class: pad token and eos token must differ, or padding could not be told from ends: "
            "choose a token that the data never holds: tokenizer.pad_token = '<|pad|>'"
        )
    return tokenizer


def set_rounds(args: PPOConfig, train_dataset: Any) -> None:
    """`args.max_steps` in rounds, from `total_episodes` or the epochs."""
    sized = train_dataset is not None and hasattr(train_dataset, "__len__")
    if sized and not len(train_dataset):
        raise UsageError("train_dataset: has no prompts")
    if train_dataset is not None and not sized:
        args.accelerator_config.dispatch_batches = False  # rows are not tensors that one rank could send
    if args.total_episodes is not None:
        args.max_steps = -(-args.total_episodes // args.episodes_per_round)
    elif args.max_steps <= 0 and sized:
        args.max_steps = -(-int(args.num_train_epochs * len(train_dataset)) // args.episodes_per_round)
    elif args.max_steps <= 0 and train_dataset is not None:
        raise UsageError("train_dataset: a stream has no length; set max_steps or total_episodes")
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every parameter is used in every forward


def default_generator(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, stop: frozenset[int], autocast: torch.dtype | None
) -> Generator:
    """What `generation_backend` names; `stop` are the tokens that end a completion."""
    settings = (tokenizer, args.response_length, args.local_rollout_forward_batch_size, args.seed, autocast)
    if args.generation_backend == "batched":
        return BatchedGenerator(*settings)
    return TransformersGenerator(*settings, stop)


def actor_critic(
    model: PreTrainedModel, reward_model: PreTrainedModel | None, args: PPOConfig, peft_config: Any
) -> tuple[ActorCritic, ActorCritic | None]:
    """What is trained, and the reference; None under LoRA, where it is the policy without its adapter.

    Raises:
        UsageError: the model already carries an adapter, or is sharded by ZeRO-3.
    """
    if is_adapter(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            "model: it already carries an adapter, and with that switched off it is not the model that PPO "
            "starts from. Merge it first (model = model.merge_and_unload(), or `trueup merge`), and ask for "
            "a new adapter by peft_config"
        )
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise UsageError("deepspeed: ZeRO stage 3 is not supported by PPO; use stage 2, or FSDP")
    disable_dropout(model)
    if reward_model is not None and not args.share_trunk:
        value = ValueModel.from_reward_model(reward_model)
    else:
        value = ValueModel.from_policy(model, args.share_trunk)
    disable_dropout(value)
    if peft_config is not None:
        from peft import get_peft_model

        if peft_config.is_prompt_learning:
            raise UsageError("peft_config: prompt learning is not supported by PPO; use LoRA")
        policy = get_peft_model(model, peft_config)
        disable_dropout(policy)
        return ActorCritic(policy, value.requires_grad_(True), args.temperature), None
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    reference = ActorCritic(frozen, None, args.temperature)
    return ActorCritic(model, value.requires_grad_(True), args.temperature), reference
