"""Guards: each speaks on a series made for it, and none on healthy ones."""

import math
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from trueup.eval import guard_callback
from trueup.eval.guard_callback import GuardCallback
from trueup.eval.guards import RULES, Alarm, Guard, Limits

Log = list[dict[str, float]]


def alarms(log: Log, limits: Limits | None = None) -> list[Alarm]:
    """All alarms of a log, one line every ten steps."""
    guard = Guard(limits)
    return [alarm for index, line in enumerate(log) for alarm in guard.observe(line, 10 * (index + 1))]


def names(log: Log, limits: Limits | None = None) -> list[str]:
    return [alarm.name for alarm in alarms(log, limits)]


def series(name: str, *values: float) -> Log:
    return [{name: value} for value in values]


# Each alarm with the run that is made for it, and the step at which it has to speak.
MADE: dict[str, tuple[Log, int]] = {
    "not_finite": ([{"loss": 1.0}, {"loss": math.nan}], 20),
    "margins_at_zero": (series("rewards/margins", 0.0, 0.0, 0.0, 1e-5, -2e-5), 50),
    "both_log_probs_fall": (
        [
            {"rewards/chosen": -0.1 * i, "rewards/rejected": -0.3 * i, "eval_score": 0.6 - 0.02 * i}
            for i in range(6)
        ],
        50,
    ),
    "repetition_runs_away": (series("eval_repetition", 0.05, 0.06, 0.3, 0.5), 40),
    "length_runs_away": (series("completions/mean_length", 20, 22, 41, 45), 40),
    "eos_collapses": (series("eos_rate", 0.9, 0.8, 0.4, 0.3), 40),
    "reward_model_at_chance": (series("eval_accuracy", 0.49, 0.5, 0.51), 30),
    "kl_negative": (series("objective/kl", 0.01, -0.1, -0.2, -0.3), 40),
    "value_model_worthless": (series("val/explained_variance", -0.5, 0.1, -0.2, -0.3, -0.2), 50),
    "update_explodes": (series("policy/approxkl_avg", 0.01, 0.02, 0.9), 30),
    "reward_hacked": (
        [{"objective/scores": 0.1 * i, "eval_score": 0.6 + 0.02 * i - 0.006 * i * i} for i in range(9)],
        60,
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_each_alarm_speaks_once_with_cause_and_fix(name: str) -> None:
    log, step = MADE[name]
    found = alarms(log)
    assert [(alarm.name, alarm.step) for alarm in found] == [(name, step)]
    assert str(found[0]).startswith(f"step {step}: ")
    assert "Likely cause: " in str(found[0])
    assert "Fix: " in str(found[0])


def test_every_rule_has_its_made_run() -> None:
    assert {rule.name for rule in RULES} | {"not_finite"} == set(MADE)


def test_other_forms_of_the_same_trouble() -> None:
    assert names(series("completions/clipped_ratio", 0.1, 0.2, 0.7, 0.8)) == ["eos_collapses"]
    assert names(series("val/ratio", 1.0, 1.01, 2.5)) == ["update_explodes"]
    assert names(series("val/ratio", 1.0, 1.01, 0.4)) == ["update_explodes"]
    assert names([{"grad_norm": math.inf}]) == ["not_finite"]


def test_a_sudden_fall_of_the_score_is_a_fall() -> None:
    scores = [0.36, 0.02, 0.0, 0.0, 0.0]
    log = [{"objective/scores": 0.1 * i, "eval_score": score} for i, score in enumerate(scores)]
    assert names(log) == ["reward_hacked"]


def test_what_hardly_ever_ended_cannot_collapse() -> None:
    assert names(series("eval_eos_rate", 0.03, 0.01, 0.0, 0.0)) == []


def healthy_dpo(rng: np.random.Generator) -> Log:
    """Margins open, chosen falls a little (as it does), the validation score rises noisily."""
    noise = rng.normal(0, 1, (60, 4))
    return [
        {
            "loss": 0.69 - 0.005 * i + 0.02 * noise[i, 0],
            "rewards/margins": 0.03 * i + 0.05 * noise[i, 1],
            "rewards/chosen": -0.005 * i + 0.03 * noise[i, 2],
            "rewards/rejected": -0.035 * i + 0.03 * noise[i, 3],
        }
        | ({"eval_score": 0.6 + 0.002 * i + 0.01 * noise[i, 0], "eval_kl": 0.02 * i} if i % 5 == 0 else {})
        for i in range(60)
    ]  # fmt: skip


def healthy_ppo(rng: np.random.Generator) -> Log:
    """Reward and validation score rise together, KL grows, the value model learns after a bad start."""
    noise = rng.normal(0, 1, (60, 5))
    return [
        {
            "objective/scores": 0.03 * i + 0.1 * noise[i, 0],
            "objective/kl": 0.05 * i + 0.02 * noise[i, 1],
            "val/explained_variance": min(0.6, -0.5 + 0.3 * i) + 0.05 * noise[i, 2],
            "val/ratio": 1 + 0.02 * noise[i, 3],
            "policy/approxkl_avg": 0.02 + 0.01 * abs(noise[i, 4]),
            "completions/mean_length": 30 + 0.2 * i + 3 * noise[i, 0],
            "completions/clipped_ratio": max(0.0, 0.05 + 0.02 * noise[i, 1]),
        }
        | ({"eval_score": 0.6 + 0.15 * (1 - math.exp(-i / 15)) + 0.01 * noise[i, 2]} if i % 5 == 0 else {})
        for i in range(60)
    ]


def healthy_reward(rng: np.random.Generator) -> Log:
    noise = rng.normal(0, 0.02, 20)
    return [
        {"eval_accuracy": 0.5 + 0.15 * (1 - math.exp(-i)) + noise[i], "margin": 0.1 * i} for i in range(20)
    ]


@pytest.mark.parametrize("healthy", [healthy_dpo, healthy_ppo, healthy_reward])
def test_healthy_runs_are_left_alone(healthy: Any) -> None:
    """Over 40 seeds of noise at most one false alarm."""
    spoken = [alarm for seed in range(40) for alarm in alarms(healthy(np.random.default_rng(seed)))]
    assert len(spoken) <= 1, [str(alarm) for alarm in spoken]


def test_both_falling_is_fine_while_the_score_is() -> None:
    log = [
        {"rewards/chosen": -0.1 * i, "rewards/rejected": -0.3 * i, "eval_score": 0.6 + 0.02 * i}
        for i in range(9)
    ]
    assert names(log) == []


def test_a_score_that_falls_with_its_reward_is_not_hacking() -> None:
    assert names([{"objective/scores": -0.1 * i, "eval_score": 0.6 - 0.02 * i} for i in range(9)]) == []


def test_warm_up_is_given_its_time() -> None:
    log = series("rewards/margins", 0.0, 0.0, 0.0, 0.0, 0.0, 0.01)
    assert names(log, Limits(warmup_steps=30)) == []
    assert names(log, Limits(warmup_steps=20)) == ["margins_at_zero"]


def test_few_pairs_make_chance_wide() -> None:
    log = series("eval_accuracy", 0.55, 0.55, 0.55)
    assert names(log, Limits(eval_pairs=4000)) == []
    assert names(log, Limits(eval_pairs=100)) == ["reward_model_at_chance"]


def test_an_alarm_is_raised_again_only_after_it_has_cleared() -> None:
    log = series("policy/approxkl_avg", 0.9, 0.9, 0.9, 0.01, 0.9)
    assert [alarm.step for alarm in alarms(log)] == [10, 50]


def test_alarms_that_are_not_wanted() -> None:
    guard = Guard(ignore=["not_finite"])
    assert guard.observe({"loss": math.nan}, 1) == []


# ----------------------------------------------------------------------------------------------- the callback


def run(callback: GuardCallback, log: Log, history: Log | None = None) -> TrainerControl:
    """What Trainer does with a callback, for a log with one line a step."""
    args = TrainingArguments(use_cpu=True, report_to=[])
    state, control = TrainerState(log_history=list(history or [])), TrainerControl()
    callback.on_train_begin(args, state, control)
    for line in log:
        state.global_step += 1
        callback.on_log(args, state, control, logs=line)
        if control.should_training_stop:
            break
    return control


def test_warn_goes_on_and_stop_stops_with_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(guard_callback.logger, "warning", said.append)
    log = series("loss", 1.0, math.nan, 1.0)
    warning, stopping = GuardCallback(), GuardCallback(on_alarm="stop")
    assert not run(warning, log).should_training_stop
    assert said == [str(warning.alarms[0])]
    control = run(stopping, [*log, {"val/ratio": 9.0}])
    assert control.should_training_stop
    assert control.should_save
    assert (
        [alarm.name for alarm in warning.alarms]
        == [alarm.name for alarm in stopping.alarms]
        == ["not_finite"]
    )


def test_a_resumed_run_remembers_its_healthy_start() -> None:
    before = [{"completions/mean_length": length, "step": step} for step, length in enumerate([20, 21, 22])]
    callback = GuardCallback()
    run(callback, series("completions/mean_length", 50, 55), before)
    assert [alarm.name for alarm in callback.alarms] == ["length_runs_away"]
