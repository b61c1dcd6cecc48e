"""The PPO stage: from a recipe to a model directory, with LoRA and without, resumed and rolled back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval_models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueup.base import adapters
from trueup.preference import ppo
from trueup.recipes.directory import RECORD, identity, open_directory, write_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import RecipeError, read_recipe
from trueup.recipes.retired import RETIRED
from trueup.recipes.run import open_run
from trueup.recipes.schema import schema_of

WORDS = ["sun", "moon", "star", "tree", "river", "stone", "bird", "fish", "cloud", "rain", "snow", "wind"]


def save(model: Any, path: Path, record: bool = False) -> Path:
    model.save_pretrained(path)
    eval_models.tokenizer().save_pretrained(path)
    if record:
        write_json(path / RECORD, {"stage": "reward", "identity": identity(path), "metrics": {}})
    return path


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: Callable[..., Path]) -> Callable[..., Any]:
    """A small recipe over conversations, with the changes given."""
    sft = save(eval_models.policy(), tmp_path / "sft")
    calibrated = eval_models.reward_model(seed=3, reward_mean=0.5, reward_std=2.0)
    reward = save(calibrated, tmp_path / "reward", record=True)
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"{one} {other}" for one in WORDS for other in WORDS[:4]] + ["long " * 40]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: Any) -> Any:
        keys: dict[str, Any] = {
            "stage": "ppo", "model_name_or_path": str(sft), "reward_model_name_or_path": str(reward),
            "dataset_name": str(prompts), "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2, "response_length": 6, "max_steps": 3, "learning_rate": 1e-3,
            "bf16": False,
            "validation_split_size": 0.2, "max_eval_prompts": 8, "disable_tqdm": True,
        }  # fmt: skip
        keys = {key: value for key, value in (keys | changes).items() if value != "unset"}
        return read_recipe(write_recipe("".join(f"{k}: {json.dumps(v)}\n" for k, v in keys.items())))

    return make


def run(recipe: Any) -> Path:
    opened, stage = open_run(recipe)
    with opened.working():
        stage.run(opened)
    return opened.output_dir


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_stage_publishes_a_model_directory(recipe: Any, use_peft: bool, tmp_path: Path) -> None:
    out = run(recipe(use_peft=use_peft))
    opened = open_directory(out, "causal-lm")
    record = opened.record
    assert record["stage"] == "ppo"
    assert set(record["parents"]) == {"model_name_or_path", "reward_model_name_or_path"}
    assert record["parents"]["model_name_or_path"]["identity"] == identity(tmp_path / "sft")
    assert record["tokens"] > 3 * 8
    assert record["metrics"]["steps"] == 3
    assert record["metrics"]["eval_kl"] != 0
    assert (out / "adapter" / "adapter_config.json").exists() == use_peft
    policy = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    ids = torch.tensor([[1, 40, 50, 60]])
    assert not torch.allclose(policy(ids).logits, start(ids).logits, atol=1e-3)
    assert AutoTokenizer.from_pretrained(out).chat_template
    points = [json.loads(line) for line in (out / "frontier.jsonl").read_text().splitlines()]
    assert {point["split"] for point in points} == {"train", "validation"}
    assert (out / "ppo.png").exists()


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_run_that_died_goes_on_to_the_same_model(
    recipe: Any, use_peft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trueup.preference.ppo_trainer import PPOTrainer

    keys: dict[str, Any] = {"save_steps": 1, "use_peft": use_peft, "max_steps": 4}
    whole = run(recipe(output_dir=str(tmp_path / "whole"), **keys))
    measure = PPOTrainer._measure

    def dying(self: PPOTrainer, *args: Any) -> None:
        if self.state.global_step == 2:
            raise RuntimeError("power cut")
        measure(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "_measure", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            run(recipe(**keys))
    assert identity(run(recipe(**keys))) == identity(whole)


def test_prompts_without_room_for_a_completion_are_left_out(
    recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe(max_steps=1, validation_split_size=0.0, eval_strategy="no"))
    assert "left out 1 prompts of over 122 tokens" in capsys.readouterr().out


def test_a_callable_reward_a_scorer_and_episodes(recipe: Any) -> None:
    out = run(
        recipe(
            reward_model_name_or_path="unset", reward_funcs=["length", "test_ppo_stage:commas"],
            reward_weights=[0.1, 1.0], scorers=["length"], max_steps="unset", total_episodes=20,
        )
    )  # fmt: skip
    metrics = open_directory(out).record["metrics"]
    assert metrics["steps"] == 3  # of 8 episodes
    assert metrics["eval_score"] == metrics["eval_scorers/length"]


def commas(prompts: Any, completions: Any, **_: Any) -> list[float]:
    return [float(turns[-1]["content"].count(",")) for turns in completions]


def test_contradictions_are_told_with_their_lines(recipe: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(
            total_episodes=10, num_train_epochs=2.0, adaptive_kl_target=3.0, reward_weights=[1.0, 2.0],
            eval_steps=2,
        )  # fmt: skip
    text = str(caught.value)
    assert "max_steps and total_episodes both say how long to train" in text
    assert "num_train_epochs and total_episodes both say how long to train" in text
    assert "adaptive_kl_target is read by kl_controller: adaptive alone" in text
    assert "reward_weights has 2 weights for 1 rewards" in text
    assert "eval_steps" not in text
    assert len(caught.value.problems) == 4
    with pytest.raises(RecipeError, match="reward_funcs is missing: name a reward"):
        recipe(reward_model_name_or_path="unset")
    with pytest.raises(UsageError, match="top_k: 50 would not sample from the policy itself"):
        recipe(top_k=50).build()


TRL_1_12 = (
    "learning_rate", "dataset_num_proc", "num_mini_batches", "total_episodes",
    "local_rollout_forward_batch_size", "num_sample_generations", "response_length", "stop_token",
    "stop_token_id", "temperature", "missing_eos_penalty", "sft_model_path", "world_size",
    "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size", "push_to_hub", "reward_model_path", "model_adapter_name", "ref_adapter_name",
    "num_ppo_epochs", "whiten_rewards", "kl_coef", "kl_estimator", "cliprange", "vf_coef",
    "cliprange_value", "gamma", "lam", "ds3_gather_for_generation",
)  # fmt: skip


def test_every_key_of_trls_last_ppo_works_or_says_what_replaced_it(recipe: Any, tmp_path: Path) -> None:
    schema = schema_of(ppo.PPORecipe)
    assert [name for name in TRL_1_12 if name not in schema and name not in RETIRED] == []
    old = recipe(
        model_name_or_path="unset", sft_model_path=str(tmp_path / "sft"), reward_model_name_or_path="unset",
        reward_model_path=str(tmp_path / "reward"), stop_token="eos", num_sample_generations=0,
        max_steps="unset", num_total_batches=7,
    )  # fmt: skip
    assert old.build().max_steps == 7
    assert old.values["reward_model_name_or_path"] == str(tmp_path / "reward")
    assert len(old.notes) == 5


def test_the_models_of_all_evaluations_may_be_kept(recipe: Any, tmp_path: Path) -> None:
    out = run(recipe(keep_checkpoints="evaluated", eval_steps=1))
    kept = sorted(path.name for path in Path(f"{out}.work").glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    last = AutoModelForCausalLM.from_pretrained(f"{out}.work/checkpoint-3").state_dict()
    published = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, published[name]) for name, tensor in last.items())
    size = sum(path.stat().st_size for path in Path(f"{out}.work/checkpoint-3").rglob("*"))
    assert size < 1.2 * sum(path.stat().st_size for path in out.glob("*.*"))  # no optimizer, no value model
    assert not list(run(recipe(output_dir=str(tmp_path / "not"))).parent.glob("not.work/checkpoint-*"))


def test_a_recipe_may_hold_trainings_arguments_of_all_kinds(recipe: Any) -> None:
    stage = recipe(
        lr_scheduler_type="cosine", max_grad_norm=0.5, warmup_steps=2, weight_decay=0.1, adam_beta2=0.95,
        dataset_streaming=True, max_steps="unset", total_episodes=16, seed=7,
    ).build()  # fmt: skip
    assert stage.total_episodes == 16


def test_the_reference_under_lora_is_the_start_model_bit_by_bit(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    start = open_directory(save(eval_models.policy(), tmp_path / "sft"))
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(start.path), config)
    adapters.assert_reference(policy, start)
    with torch.no_grad():
        policy.get_base_model().model.norm.weight[3] += 1e-6
    with pytest.raises(TrueupError, match=r"model\.norm\.weight of the reference is not that of the model"):
        adapters.assert_reference(policy, start)


def test_an_alarm_stops_and_rolls_back(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trueup.eval import guards

    def at_three(history: guards.History) -> str | None:
        rounds = [step for series in history.series("proxy") for step, _ in series]
        return "it is round 3" if rounds[-1:] == [3] else None

    monkeypatch.setattr(guards, "RULES", (guards.Rule("three", at_three, "the test", "none"),))
    seen = {}
    original = ppo.roll_back

    def noting(trainer: Any, alarm: int) -> int:
        step = original(trainer, alarm)
        checkpoint = AutoModelForCausalLM.from_pretrained(
            Path(trainer.args.output_dir) / f"checkpoint-{step}"
        )
        seen["weights"] = checkpoint.state_dict()
        return step

    monkeypatch.setattr(ppo, "roll_back", noting)
    out = run(recipe(max_steps=6, save_steps=1, on_alarm="rollback"))
    metrics = open_directory(out).record["metrics"]
    assert metrics["rolled_back_to"] == 2
    assert metrics["alarms"] == 1
    published = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in seen["weights"].items():
        assert torch.equal(published[name], tensor), name
