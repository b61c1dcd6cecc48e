"""A tiny PPO: models, prompts, a reward that counts a token, and a trainer with everything set for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import eval_models
from datasets import Dataset

from trueup.preference.ppo_config import PPOConfig
from trueup.preference.ppo_trainer import PPOTrainer

PROMPTS = ["x", "a rather longer prompt", "yy", "mid one", "q", "another, of its own length", "b", "cc d"]


def counted() -> int:
    """The token that the bandit pays for: 1 % of what `eval_models.policy()` says, so it is soon found."""
    return int(eval_models.tokenizer()("J")["input_ids"][-1])


def bandit(prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of the counted token in 8 tokens."""
    return [sum(token == counted() for token in ids) / 8 for ids in completion_ids]


def nothing(prompts: Any, completions: Any, **_: Any) -> list[float]:
    """No reward."""
    return [0.0] * len(completions)


def prompts(times: int = 1) -> Dataset:
    """PROMPTS, and more that are all different and end alike."""
    more = [f"{number} {text}" for number in range(1, times) for text in PROMPTS]
    return Dataset.from_dict({"prompt": PROMPTS + more})


def config(folder: Path, **changes: Any) -> PPOConfig:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_steps": 2, "response_length": 6, "learning_rate": 1e-3,
        "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "log_level": "error",
    }  # fmt: skip
    return PPOConfig(str(folder), **settings | changes)


def trainer(folder: Path, model: Any = None, reward: Any = bandit, **changes: Any) -> PPOTrainer:
    """A trainer of a wide random model; `changes` are PPOConfig's keys or PPOTrainer's arguments."""
    names = ("train_dataset", "eval_dataset", "callbacks", "peft_config", "scorers", "generator")
    arguments = {name: changes.pop(name) for name in names if name in changes}
    return PPOTrainer(
        eval_models.policy() if model is None else model,
        reward,
        config(folder, **changes),
        processing_class=eval_models.tokenizer(),
        **{"train_dataset": prompts(), **arguments},
    )


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})
