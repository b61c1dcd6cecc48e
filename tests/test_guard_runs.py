"""Guards on real runs: each alarm is triggered by a training made for it, and healthy ones are left alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval_models
import ppo_models
import pytest
import test_online
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from trueup.eval.guard_callback import GuardCallback
from trueup.eval.guards import RULES, Guard, Limits
from trueup.eval.sampler import SamplingSettings, sample
from trueup.eval.scorers import FunctionScorer
from trueup.eval.validation import Validation, ValidationCallback

QUIET: dict[str, Any] = {
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "log_level": "error",
    "logging_steps": 1, "lr_scheduler_type": "constant",
}  # fmt: skip
SOON = Limits(warmup_steps=3)


def token(text: str) -> int:
    return int(eval_models.tokenizer()(text)["input_ids"][-1])


def speaker(**shares: float) -> PreTrainedModel:
    """A model that says each letter (or `eos`) with the probability given, and all else equally often.

    Its blocks add nothing at first. The first feature of every embedding is the same, so the head's first
    column alone makes the logits, but for a little noise.
    """
    model = eval_models.policy(initializer_range=0.02, tie_word_embeddings=False)
    rest = math.log((1 - sum(shares.values())) / (len(eval_models.tokenizer()) - len(shares)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.get_input_embeddings().weight[:, 0] = 1.0
        head = model.get_output_embeddings().weight
        head[:, 0] = rest
        for letter, share in shares.items():
            head[eval_models.tokenizer().eos_token_id if letter == "eos" else token(letter), 0] = math.log(
                share
            )
        head[:, 0] /= math.sqrt(head.shape[1])  # RMS norm makes the feature so large
    return model


def share_of(letter: str, sign: float = 1.0) -> Callable[..., list[float]]:
    """A reward, or a scorer: how much of a completion is this letter."""

    def share(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        return [sign * sum(one == token(letter) for one in ids) / len(ids) for ids in completion_ids]

    return share


def validate(trainer: Any, reference: Any, scorer: Callable[..., list[float]] | None = None) -> None:
    """Evaluations on 32 prompts."""
    rows = [{"prompt": f"{text}{i}"} for text in ppo_models.PROMPTS for i in range(4)]
    scorers = [FunctionScorer(scorer, "quality")] if scorer else []
    measure = Validation(rows, eval_models.tokenizer(), scorers, max_new_tokens=12)
    trainer.add_callback(ValidationCallback(trainer, measure, reference))


def names(trainer: Any, limits: Limits | None = None) -> list[str]:
    """Train, and tell what the guard said."""
    callback = GuardCallback(Guard(limits))
    trainer.add_callback(callback)
    trainer.train()
    return [alarm.name for alarm in callback.alarms]


# ------------------------------------------------------------------------------------------------------ DPO


def dpo(folder: Path, scorer: Callable[..., list[float]] | None = None, **changes: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 3e-3, "bf16": False,
        "gradient_checkpointing": False, "beta": 0.1,
    }  # fmt: skip
    rows = [{"prompt": text, "chosen": "JJJJ", "rejected": "KKKK"} for text in ppo_models.PROMPTS]
    start = {"J": 0.4, "K": 0.2}
    reference = speaker(**start)
    trainer = DPOTrainer(
        speaker(**start), reference, DPOConfig(str(folder), **QUIET | settings | changes),
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:2]),
        processing_class=eval_models.tokenizer(),
    )  # fmt: skip
    if scorer:
        validate(trainer, reference, scorer)
    return trainer


def nothing_is_trained(folder: Path) -> list[str]:
    return names(dpo(folder, learning_rate=0.0), SOON)


def a_rate_beyond_all_numbers(folder: Path) -> list[str]:
    return names(dpo(folder, learning_rate=1e30, max_steps=3, max_grad_norm=0.0))


def both_answers_are_pushed_down(folder: Path) -> list[str]:
    """APO's "down" lowers the chosen answer too, and with it the letter that quality is measured by."""
    return names(
        dpo(
            folder, share_of("J"), loss_type=["apo_down"], max_steps=14, eval_strategy="steps", eval_steps=2,
            learning_rate=2e-3,
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- reward model


def labels_at_random(folder: Path) -> list[str]:
    from trl import RewardConfig, RewardTrainer

    rng = torch.Generator().manual_seed(0)
    texts = ["".join(chr(97 + int(i)) for i in torch.randint(26, (6,), generator=rng)) for _ in range(400)]
    rows = [{"prompt": "x", "chosen": texts[2 * i], "rejected": texts[2 * i + 1]} for i in range(200)]
    config = RewardConfig(
        str(folder), max_steps=6, per_device_train_batch_size=8, per_device_eval_batch_size=50,
        eval_strategy="steps", eval_steps=6, bf16=False, gradient_checkpointing=False, **QUIET,
    )  # fmt: skip
    trainer = RewardTrainer(
        eval_models.reward_model(), config, train_dataset=Dataset.from_list(rows[:100]),
        eval_dataset=Dataset.from_list(rows[100:]), processing_class=eval_models.tokenizer(),
    )  # fmt: skip
    return names(trainer, Limits(warmup_steps=3, eval_pairs=100))


# ------------------------------------------------------------------------------------------------------ RLOO


def rloo(folder: Path, start: PreTrainedModel, reward: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 16, "per_device_train_batch_size": 32, "num_generations": 8, "learning_rate": 1e-2,
        "max_completion_length": 12, "beta": 0.0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return test_online.trainer(folder, model=start, reward=reward, **settings | changes)


def one_letter_is_paid_for(folder: Path) -> list[str]:
    start = speaker(J=0.3)
    trainer = rloo(
        folder, start, share_of("J"), eval_strategy="steps", eval_steps=4, eval_dataset=ppo_models.prompts()
    )
    validate(trainer, start)
    return names(trainer)


def length_is_paid_for(folder: Path) -> list[str]:
    def length(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        return [len(ids) / 12 for ids in completion_ids]

    return names(rloo(folder, speaker(eos=0.35), length))


def ending_is_punished(folder: Path) -> list[str]:
    def never_ending(prompts: Any, completions: Any, ended: Any, **_: Any) -> list[float]:
        return [-float(one) for one in ended]

    return names(rloo(folder, speaker(eos=0.2), never_ending))


# ------------------------------------------------------------------------------------------------------- PPO


def ppo(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 32, "max_steps": 8, "response_length": 8, "learning_rate": 5e-3,
        "missing_eos_penalty": None, "train_dataset": ppo_models.prompts(4), "kl_coef": 0.0,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return ppo_models.trainer(folder, **settings | changes)


def sampled_with_weights_of_before(folder: Path) -> list[str]:
    before = speaker(J=0.3)

    def stale(policy: Any, prompts: Any, keys: Any, temperature: float) -> list[list[int]]:
        samples = sample(before, eval_models.tokenizer(), prompts, SamplingSettings(8), keys=keys)
        return [one.ids for one in samples]

    return names(ppo(folder, model=speaker(J=0.3), generator=stale, reward=share_of("J")))


def a_critic_that_does_not_learn(folder: Path) -> list[str]:
    trainer = ppo(folder, value_learning_rate=1e-12)
    torch.nn.init.normal_(trainer.value_model.head.weight)
    return names(trainer, SOON)


def steps_too_large(folder: Path) -> list[str]:
    return names(ppo(folder, learning_rate=0.5, max_steps=2))


def the_proxy_is_not_the_aim(folder: Path) -> list[str]:
    trainer = ppo(
        folder, model=speaker(J=0.3), reward=share_of("J"), scorers=[share_of("J", -1.0)], max_steps=12,
        eval_strategy="steps", eval_steps=2, eval_dataset=ppo_models.prompts(4),
    )  # fmt: skip
    return names(trainer)


RUNS: dict[str, Callable[[Path], list[str]]] = {
    "margins_at_zero": nothing_is_trained,
    "not_finite": a_rate_beyond_all_numbers,
    "both_log_probs_fall": both_answers_are_pushed_down,
    "reward_model_at_chance": labels_at_random,
    "repetition_runs_away": one_letter_is_paid_for,
    "length_runs_away": length_is_paid_for,
    "eos_collapses": ending_is_punished,
    "kl_negative": sampled_with_weights_of_before,
    "value_model_worthless": a_critic_that_does_not_learn,
    "update_explodes": steps_too_large,
    "reward_hacked": the_proxy_is_not_the_aim,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_made_for_an_alarm_triggers_it(name: str, tmp_path: Path) -> None:
    assert name in RUNS[name](tmp_path)


def test_every_alarm_has_its_run() -> None:
    assert {rule.name for rule in RULES} | {"not_finite"} == set(RUNS)


def test_runs_in_good_health_are_left_alone(tmp_path: Path) -> None:
    """The same models and stages; DPO with the fix that the guard names for answers that both fall."""
    learning = dpo(
        tmp_path / "dpo", share_of("J"), loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0],
        eval_strategy="steps", eval_steps=2, max_steps=12, learning_rate=1e-3,
    )  # fmt: skip
    assert names(learning, SOON) == []
    assert max(line.get("rewards/margins", 0.0) for line in learning.state.log_history) > 0.01
    held = ppo(tmp_path / "ppo", kl_coef=0.05, learning_rate=1e-3, model=speaker(J=0.3), reward=share_of("J"))
    assert names(held, SOON) == []
