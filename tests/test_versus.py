"""The versus stage: what it expands to, that it is fair, and that it chooses on validation alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import eval_models
import pytest
from compare_models import World, verdict

from trueup.app import versus
from trueup.app.runner import run_stage
from trueup.app.versus_plan import Plan, recipe_of, settings
from trueup.recipes.directory import open_directory, read_json
from trueup.recipes.errors import UsageError
from trueup.recipes.reader import Recipe, read_recipe
from trueup.recipes.run import open_run

pytestmark = pytest.mark.usefixtures("own_cache")

ARMS: dict[str, Any] = {
    "dpo": {"stage": "dpo", "per_device_train_batch_size": 4, "sweep": {"beta": [0.1, 0.3]}},
    "ppo": {"stage": "ppo", "per_device_train_batch_size": 8, "sweep": {"kl_coef": [0.05, 0.2]}},
}


def write(world: World, **changes: Any) -> Path:
    """A recipe."""
    values = {
        "stage": "versus",
        "output_dir": str(world.folder / "out" / "versus"),
        "baseline": str(world.sft),
        "dataset_name": str(world.prompts),
        "pairs_dataset_name": str(world.pairs),
        "reward_model_name_or_path": str(world.reward),
        "selector": str(world.reward),
        "scorers": ["length"],
        "total_episodes": 64,
        "seeds": [1, 2],
        "max_new_tokens": 8,
        "max_eval_prompts": 4,
        "best_of": [2],
        "arms": ARMS,
    } | changes
    path = world.folder / "versus.yaml"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


class Trainings:
    """In place of training: models with random weights, and scores that say which setting is the better."""

    def __init__(self) -> None:
        self.done: list[Recipe] = []

    def __call__(self, recipes: Sequence[Recipe]) -> None:
        for recipe in recipes:
            run, _ = open_run(recipe)
            if run.done():
                continue
            self.done.append(recipe)
            if recipe.stage == "compare":
                run_stage(recipe)
                continue
            number = len(self.done)

            def save(path: Path, number: int = number) -> None:
                eval_models.policy(seed=number, max_position_embeddings=512).save_pretrained(path)
                eval_models.tokenizer().save_pretrained(path)

            # What ranks would choose the other setting of each.
            worth = {0.1: 0.2, 0.3: 0.6, 0.05: 0.9, 0.2: 0.1}[
                recipe.values.get("beta") or recipe.values["kl_coef"]
            ]
            metrics = {"eval_score": worth, "eval_kl": 1.0, "eval_scorers/length": 1 - worth}
            with run.working():
                run.publish(save, metrics, tokens=100)


def test_settings_are_chosen_on_validation_and_the_verdict_is_on_other_seeds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the selector, not by what ranks; run again nothing is done; a new seed trains that one alone."""
    trained = Trainings()
    monkeypatch.setattr(versus, "run_recipes", trained)
    run = run_stage(read_recipe(write(world)))
    names = [Path(str(recipe.values["output_dir"])).name for recipe in trained.done]
    assert names == [
        "dpo-beta-0.1-seed-0", "dpo-beta-0.3-seed-0", "ppo-kl_coef-0.05-seed-0", "ppo-kl_coef-0.2-seed-0",
        "dpo-beta-0.3-seed-1", "dpo-beta-0.3-seed-2", "ppo-kl_coef-0.05-seed-1", "ppo-kl_coef-0.05-seed-2",
        "compare",
    ]  # fmt: skip
    found = verdict(run.output_dir)
    assert [arm["name"] for arm in found["arms"]] == ["baseline", "dpo", "ppo", "best-of-2"]
    assert (found["seeds"], found["unequal"], found["void"]) == (2, [], {})
    sweep = read_json(run.output_dir / "sweep.json")
    chosen = [(one["arm"], one["setting"]) for one in sweep["runs"] if one["chosen"]]
    assert chosen == [("dpo", {"beta": 0.3}), ("ppo", {"kl_coef": 0.05})]
    assert open_directory(run.output_dir, "comparison").record["tokens"] == 800
    assert "How the settings were chosen" in (run.output_dir / "report.html").read_text()
    run_stage(read_recipe(write(world)))
    assert len(trained.done) == 9
    run_stage(read_recipe(write(world, seeds=[1, 2, 5])))
    again = [Path(str(recipe.values["output_dir"])).name for recipe in trained.done[9:]]
    assert again == ["dpo-beta-0.3-seed-5", "ppo-kl_coef-0.05-seed-5", "compare"]


def test_all_runs_share_start_data_reward_and_budget(world: World) -> None:
    values = read_recipe(write(world)).values
    dpo, ppo = (recipe_of(Plan(name, settings(ARMS[name])[0], 3), values, "out") for name in ARMS)
    assert dpo["model_name_or_path"] == ppo["model_name_or_path"] == str(world.sft)
    assert (dpo["dataset_name"], ppo["dataset_name"]) == (str(world.pairs), str(world.prompts))
    assert dpo["scorers"] == ppo["scorers"] == [str(world.reward), "length"]  # the first is eval_score
    assert (dpo["beta"], ppo["kl_coef"], dpo["seed"], ppo["seed"]) == (0.1, 0.05, 3, 3)
    assert dpo["max_new_tokens"] == ppo["response_length"] == 8
    assert dpo["eval_steps"] == ppo["eval_steps"] == dpo["save_steps"]
    assert ppo["total_episodes"] == 64 == dpo["max_steps"] * dpo["per_device_train_batch_size"] * 2
    best = recipe_of(Plan("dpo", {}, 0), {**values, "load_best_model_at_end": True}, "out")
    assert (best["load_best_model_at_end"], best["metric_for_best_model"]) == (True, "eval_score")


def test_an_answer_that_is_learned_from_twice_counts_once(world: World) -> None:
    arm = {"stage": "grpo", "per_device_train_batch_size": 8, "num_iterations": 3}
    values = read_recipe(write(world)).values | {"arms": {"grpo": arm}, "total_episodes": 16}
    assert recipe_of(Plan("grpo", {}, 0), values, "out")["max_steps"] == 6  # 2 rollouts of 8, each 3 steps


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"selector": "length"}, "is what ranks"),
        ({"seeds": [0, 1]}, "none of them `seed`"),
        ({"total_episodes": 60}, "no whole number of its steps of 8 answers"),
        ({"pairs_dataset_name": None}, "is what dpo and kto learn from"),
        ({"reward_model_name_or_path": None, "best_of": []}, "must name the one reward model"),
        ({"arms": {"dpo": ARMS["dpo"]}}, "needs two arms"),
        ({"arms": {**ARMS, "dpo": {"stage": "dpo"}}}, "different numbers of settings (dpo 1, ppo 2)"),
        ({"arms": {**ARMS, "dpo": ARMS["dpo"] | {"betta": 1}}}, "unknown key betta; did you mean beta"),
        ({"arms": {**ARMS, "ppo": ARMS["ppo"] | {"max_steps": 9}}}, "max_steps is shared by all arms"),
        ({"arms": {**ARMS, "ppo": {"stage": "sft"}}}, "takes a mapping with a stage"),
        ({"arms": {**ARMS, "ppo": {"stage": "ppo", "sweep": {"kl_coef": 0.1}}}}, "takes lists of values"),
        ({"arms": {**ARMS, "ppo": {"stage": "ppo", "sweep": {"kl_coef": [1, 1]}}}}, "values, each once"),
        ({"arms": {**ARMS, "ppo": ARMS["ppo"] | {"kl_coef": 1}}}, "kl_coef is both fixed and swept"),
        ({"arms": {**ARMS, "ppo": ARMS["ppo"] | {"sweep": {"kl_coef": ["a", 1]}}}}, "kl_coef takes a number"),
    ],
)  # fmt: skip
def test_an_unfair_or_mistaken_recipe_is_refused(world: World, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe(write(world, **changes))
    assert told in str(caught.value)


def test_it_starts_its_runs_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without a launcher"):
        run_stage(read_recipe(write(world)))
