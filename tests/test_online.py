"""RLOO and GRPO: TRL's algorithms on our sampler, rewards and validation; resumed at rollout boundaries."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval_models
import ppo_models
import pytest
import test_ppo
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueup.base.trainer import StopWhenAsked
from trueup.eval.scorers import RewardModelScorer
from trueup.preference.online_trainer import GRPOConfig, GRPOTrainer, OnlineTrainer, RLOOConfig, RLOOTrainer
from trueup.recipes.directory import RECORD, identity, open_directory, write_json
from trueup.recipes.errors import UsageError
from trueup.recipes.reader import RecipeError, read_recipe
from trueup.recipes.run import open_run

KINDS: dict[str, tuple[Any, Any]] = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    eval_models.tokenizer().save_pretrained(path)
    return path


def trainer(
    folder: Path, kind: str = "rloo", model: Any = None, reward: Any = ppo_models.bandit, **changes: Any
) -> OnlineTrainer:
    """A trainer of a wide random model on the bandit; TRL opens the reference by its directory."""
    trainer_class, config_class = KINDS[kind]
    arguments = {
        name: changes.pop(name) for name in ("peft_config", "callbacks", "eval_dataset") if name in changes
    }
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 2,
        "learning_rate": 1e-3, "missing_eos_penalty": None, "logging_steps": 1, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "log_level": "error",
        "gradient_checkpointing": False,
    }  # fmt: skip
    start = save(eval_models.policy() if model is None else model, folder / "start")
    return trainer_class(
        AutoModelForCausalLM.from_pretrained(start),
        [reward],
        config_class(str(folder), **settings | changes),
        ppo_models.prompts(8),
        processing_class=eval_models.tokenizer(),
        **arguments,
    )


def logged(trainer: OnlineTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


# ----------------------------------------------------------------------------------------------- the bandit


@pytest.mark.parametrize("kind", KINDS)
def test_the_bandit_is_learned(kind: str, tmp_path: Path) -> None:
    """Reward: the share of one token, 1 % at the start."""
    learning = trainer(
        tmp_path, kind, per_device_train_batch_size=32, num_generations=8, max_steps=40, learning_rate=5e-3,
        beta=0.005, logging_steps=10, lr_scheduler_type="constant",
    )  # fmt: skip
    learning.train()
    rewards = logged(learning, "reward")
    assert rewards[0] < 0.3
    assert rewards[-1] > 0.4
    assert min(logged(learning, "kl")) > 0


@pytest.mark.slow
def test_rloo_reaches_the_optimum_that_ppo_reaches(tmp_path: Path) -> None:
    """The same bandit, KL coefficient and bounds as test_ppo.py holds PPO and TRL's own RLOO to."""
    beta = 1 / 8 / math.log(279)
    policy = test_ppo._chain()
    best = test_ppo._best_reward(policy, beta)
    learning = trainer(
        tmp_path, model=policy, beta=beta, max_steps=400, per_device_train_batch_size=64, num_generations=8,
        learning_rate=3e-3, logging_steps=10,
    )  # fmt: skip
    learning.train()
    assert sum(logged(learning, "reward")[-4:]) / 4 == pytest.approx(best, abs=0.03)


# ----------------------------------------------------------------------------------- sampling and rewarding


def test_a_rollouts_completions_depend_on_its_number_alone(tmp_path: Path) -> None:
    sampling = trainer(tmp_path, steps_per_generation=2)
    sampling.model.train()
    prompts = [[5, 6, 7]] * 8
    first = sampling._generate_single_turn(prompts)
    torch.manual_seed(99)
    sampling.state.global_step = 1  # the same rollout's second step
    assert sampling._generate_single_turn(prompts) == first
    sampling.state.global_step = 2
    assert sampling._generate_single_turn(prompts) != first
    assert len({tuple(ids) for ids in first}) == 8
    assert sampling.model.training


def test_trls_own_generation_is_a_fall_back(tmp_path: Path) -> None:
    generating = trainer(tmp_path, generation_backend="transformers", missing_eos_penalty=1.0)
    generating.train()
    assert len(logged(generating, "reward")) == 2
    assert 0 < logged(generating, "completions/mean_length")[0] <= 8


def test_a_reward_model_reads_the_policys_own_tokens_and_what_was_cut(tmp_path: Path) -> None:
    model = eval_models.reward_model(seed=3, reward_mean=0.5, reward_std=2.0)
    judged = trainer(tmp_path, reward=model, missing_eos_penalty=0.5)
    eos = eval_models.tokenizer().eos_token_id
    # Bytes that a tokenizer would have joined or dropped: only as ids are they what the policy said.
    completions = [[40, 40, 200, eos], [40, 40, 200]]
    texts = eval_models.tokenizer().batch_decode(completions, skip_special_tokens=True)
    prompts = ["yy", "yy"]
    said = judged._calculate_rewards([{"prompt": text} for text in prompts], prompts, texts, completions)
    start = eval_models.tokenizer()("yy")["input_ids"]
    expected = RewardModelScorer(model, eval_models.tokenizer(), "x").score_tokens(
        [start + ids for ids in completions]
    )
    assert said[:, 0].tolist() == pytest.approx(expected)
    assert said[:, 1].tolist() == [0.0, -1.0]
    assert judged.reward_func_names[1] == "missing_eos"
    assert judged.reward_weights.tolist() == [1.0, 0.5]


def test_columns_reach_the_reward_and_a_row_without_a_verdict_stays_one(tmp_path: Path) -> None:
    def knows(prompts: Any, completions: Any, truth: Any, ended: Any, **_: Any) -> list[float | None]:
        return [None if one is None else float(one) + end for one, end in zip(truth, ended, strict=True)]

    judged = trainer(tmp_path, reward=knows, missing_eos_penalty=1.0)
    rows = [{"prompt": "x", "truth": truth} for truth in (2, None)]
    said = judged._calculate_rewards(rows, ["x", "x"], ["a", "b"], [[40], [41]])
    assert said[0].tolist() == [2.0, -1.0]
    assert said[1].isnan().all()


def test_dropout_is_off_in_policy_and_adapter(tmp_path: Path) -> None:
    model = eval_models.policy(attention_dropout=0.5, residual_dropout=0.5)
    dropping = trainer(tmp_path, model=model, peft_config=ppo_models.lora(lora_dropout=0.5))
    dropping.model.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(dropping.model(ids).logits, dropping.model(ids).logits)


# --------------------------------------------------------------------------------------- rollout boundaries


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"steps_per_generation": 4, "save_steps": 6}, "save_steps: 6 is not a multiple of 4.*: 4 or 8$"),
        (
            {"save_strategy": "best", "num_iterations": 2, "eval_steps": 3, "metric_for_best_model": "score"},
            "eval_steps: 3 is not a multiple of 2.*: 2 or 4$",
        ),
        ({"num_iterations": 3, "save_steps": 2}, "save_steps: 2 is not a multiple of 3.*exactly: 3$"),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 8, "save_steps": 3},
            "save_steps: 3 is not a multiple of 4.*exactly: 4$",
        ),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
            "steps_per_generation: 3 x num_iterations 1 is not a multiple of gradient_accumulation_steps 2",
        ),
    ],
)
def test_checkpoints_within_a_rollout_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, **{"save_strategy": "steps", **keys})


def test_a_share_of_the_steps_is_rounded_up_to_whole_rollouts(tmp_path: Path) -> None:
    saving = trainer(
        tmp_path, steps_per_generation=2, max_steps=8, save_strategy="steps", save_steps=0.3,
        save_total_limit=9,
    )  # fmt: skip
    saving.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


def test_asked_to_stop_within_a_rollout_it_ends_the_rollout_first(tmp_path: Path) -> None:
    from trueup.base.interrupt import StopRequest

    request = StopRequest()
    request.number = 15
    stopping = trainer(
        tmp_path, steps_per_generation=3, max_steps=9, save_strategy="steps", save_steps=9,
        callbacks=[StopWhenAsked(request)],
    )  # fmt: skip
    stopping.train()
    assert stopping.state.global_step == 3
    assert (tmp_path / "checkpoint-3").exists()


def test_a_rollout_needs_its_prompts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a rollout takes 100 prompts, and there are 64"):
        trainer(tmp_path, per_device_train_batch_size=400)


# --------------------------------------------------------------------------------------------------- stages


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: Callable[..., Path]) -> Callable[..., Any]:
    """make(stage, **changes): a small recipe over conversations; an epoch is two rollouts of two steps."""
    sft = save(eval_models.policy(), tmp_path / "sft")
    reward = save(eval_models.reward_model(seed=3, reward_mean=0.5, reward_std=2.0), tmp_path / "reward")
    write_json(reward / RECORD, {"stage": "reward", "identity": identity(reward), "metrics": {}})
    for split, count in (("train", 9), ("validation", 8)):
        rows = [{"prompt": [{"role": "user", "content": f"{split} {i}"}]} for i in range(count)]
        rows += [{"prompt": [{"role": "user", "content": "long " * 40}]}] * (split == "train")
        path = tmp_path / "prompts" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(stage: str = "rloo", **changes: Any) -> Any:
        keys: dict[str, Any] = {
            "stage": stage, "model_name_or_path": str(sft), "reward_model_name_or_path": str(reward),
            "dataset_name": str(tmp_path / "prompts"), "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4, "num_generations": 2, "steps_per_generation": 2,
            "max_completion_length": 6, "max_steps": 4, "learning_rate": 1e-3, "bf16": False,
            "max_eval_prompts": 8, "scorers": ["length"], "log_completions": False, "disable_tqdm": True,
        }  # fmt: skip
        keys = {key: value for key, value in (keys | changes).items() if value != "unset"}
        return read_recipe(write_recipe("".join(f"{k}: {json.dumps(v)}\n" for k, v in keys.items())))

    return make


def run(recipe: Any) -> Path:
    opened, stage = open_run(recipe)
    with opened.working():
        stage.run(opened)
    return opened.output_dir


@pytest.mark.parametrize(
    ("stage", "changes"), [("rloo", {}), ("grpo", {"use_peft": True}), ("grpo", {"beta": 0.0})]
)
def test_a_stage_publishes_a_model_directory(
    recipe: Any, stage: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(recipe(stage, **changes))
    said = capsys.readouterr().out
    assert "left out 1 prompts of over 122 tokens" in said
    assert "rollouts of 8 completions, 2 of each prompt; 2 optimizer steps on one" in said
    record = open_directory(out, "causal-lm").record
    assert record["stage"] == stage
    assert set(record["parents"]) == {"model_name_or_path", "reward_model_name_or_path"}
    assert record["tokens"] > 2 * 8
    metrics = record["metrics"]
    assert metrics["steps"] == 4
    assert metrics["eval_kl"] != 0
    assert metrics["eval_score"] == metrics["eval_scorers/length"]
    assert (out / "adapter" / "adapter_config.json").exists() == bool(changes.get("use_peft"))
    policy, start = (AutoModelForCausalLM.from_pretrained(path) for path in (out, tmp_path / "sft"))
    ids = torch.tensor([[1, 40, 50, 60]])
    assert not torch.allclose(policy(ids).logits, start(ids).logits, atol=1e-3)
    assert AutoTokenizer.from_pretrained(out).chat_template
    points = [json.loads(line) for line in (out / "frontier.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [0, 2, 4]
    assert points[0]["kl"] == 0


@pytest.mark.parametrize(("stage", "use_peft"), [("rloo", False), ("grpo", True)])
def test_a_run_that_died_goes_on_to_the_same_model(
    recipe: Any, stage: str, use_peft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a rollout of the second epoch."""
    keys: dict[str, Any] = {"save_steps": 2, "use_peft": use_peft, "max_steps": 8}
    whole = run(recipe(stage, output_dir=str(tmp_path / "whole"), **keys))
    trainer_class = KINDS[stage][0]
    step = trainer_class.training_step

    def dying(self: OnlineTrainer, *args: Any) -> Any:
        if self.state.global_step == 7:
            raise RuntimeError("power cut")
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "training_step", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            run(recipe(stage, **keys))
    assert identity(run(recipe(stage, **keys))) == identity(whole)


def test_evaluations_and_guards_are_those_of_every_preference_stage(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trueup.eval import guards

    def second_rollout(history: guards.History) -> str | None:
        proxy = history.series("proxy")
        return "it is step 3" if proxy and proxy[0][-1][0] == 3 else None

    monkeypatch.setattr(guards, "RULES", (guards.Rule("second", second_rollout, "the test", "none"),))
    opened, stage = open_run(recipe(max_steps=8, on_alarm="stop", logging_steps=1, eval_steps=2))
    with opened.working():
        stage.run(opened)
        tables = sorted((opened.work_dir / "completions").glob("step-*.jsonl"))
        assert [path.name for path in tables] == ["step-0.jsonl", "step-2.jsonl", "step-4.jsonl"]
        assert len(tables[0].read_text().splitlines()) == 8
    metrics = open_directory(opened.output_dir).record["metrics"]
    assert metrics["steps"] == 4  # the alarm was at step 3, within a rollout
    assert metrics["alarms"] == 1


def test_the_models_of_all_evaluations_may_be_kept(recipe: Any) -> None:
    kept = {"keep_checkpoints": "evaluated", "eval_steps": 2}
    out = run(recipe(**kept))
    names = sorted(path.name for path in Path(f"{out}.work").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(UsageError, match="eval_steps: 3 is not a multiple of 2"):
        recipe(**kept | {"eval_steps": 3}).build()


def test_contradictions_are_told_with_their_lines(recipe: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(
            reward_weights=[1.0, 2.0], min_p=0.1, num_generations_eval=2, num_train_epochs=2.0,
            chat_template_kwargs={"a": 1}, max_completion_length=None, eval_steps=2, sync_ref_model=True,
            scorers="unset", metric_for_best_model="score",
        )  # fmt: skip
    text = str(caught.value)
    assert "reward_weights has 2 weights for 1 rewards" in text
    assert "min_p is read with generation_backend: transformers" in text
    assert "num_generations_eval has no effect" in text
    assert "num_train_epochs and max_steps both say how long to train" in text
    assert "metric_for_best_model is the first scorer's" in text
    assert "sync_ref_model moves the reference" in text
    assert "chat_template_kwargs is not handed on" in text
    assert "max_completion_length must be a number of tokens above 0" in text
    assert len(caught.value.problems) == 8
    with pytest.raises(RecipeError, match="reward_funcs is missing: name a reward"):
        recipe(reward_model_name_or_path="unset")
    with pytest.raises(UsageError, match="save_steps: 3 is not a multiple of 2"):
        recipe(save_steps=3).build()


# ----------------------------------------------------------------------------------------------------- faults

_KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import conftest, test_online, pathlib, signal
from transformers import TrainerCallback
from trueup.base.trainer import newest_checkpoint

class Kill(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

folder = pathlib.Path(sys.argv[1])
trainer = test_online.trainer(
    folder, sys.argv[3], steps_per_generation=2, num_iterations=2, max_steps=12, save_strategy="steps",
    save_steps=4, learning_rate=1e-2, callbacks=[Kill()],
)
trainer.train(resume_from_checkpoint=str(newest_checkpoint(folder) or "") or None)
trainer.save_model(str(folder / "done"))
"""


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "step"), [("rloo", 5), ("grpo", 11)])
def test_kill_and_resume_ends_at_the_same_content_hash(kind: str, step: int, tmp_path: Path) -> None:
    code = _KILLED.format(tests=str(Path(__file__).parent))

    def run(folder: str, kill_at: int) -> int:
        command = [sys.executable, "-c", code, str(tmp_path / folder), str(kill_at), kind]
        return subprocess.run(command, check=False, timeout=300, capture_output=True).returncode

    assert run("straight", -1) == 0
    assert run("killed", step) == -9
    assert run("killed", -1) == 0
    assert identity(tmp_path / "killed" / "done") == identity(tmp_path / "straight" / "done")
