"""What a `versus` recipe expands to: an ordinary recipe for each run.

Shared by all: the model they start from, prompts and pairs, the reward, how many answers each learns from,
how often it is validated and by what. An arm's own: the stage, its hyper-parameters, the settings to try.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from trueup.base.data import DataArguments
from trueup.recipes.errors import UsageError
from trueup.recipes.reader import Entry, check_entries
from trueup.recipes.schema import schema_of
from trueup.recipes.stages import stage_class

Values = dict[str, Any]

# Which of the shared keys a stage takes, under its own names.
OFFLINE = {"dataset_name": "pairs_dataset_name", "max_new_tokens": "max_new_tokens"}
ONLINE = {"dataset_name": "dataset_name", "reward_model_name_or_path": "reward_model_name_or_path"}
STAGES: dict[str, dict[str, str]] = {
    "dpo": OFFLINE,
    "kto": OFFLINE,
    "ppo": ONLINE | {"response_length": "max_new_tokens"},
    "rloo": ONLINE | {"max_completion_length": "max_new_tokens"},
    "grpo": ONLINE | {"max_completion_length": "max_new_tokens"},
}
LENGTH = ("total_episodes", "max_steps", "num_train_epochs")  # keys that say how long to train
# Shared keys under one name everywhere.
COMMON = ("model_name_or_path", "output_dir", "seed", "scorers", "max_eval_prompts", "eval_strategy",
          "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end", "metric_for_best_model",
          "greater_is_better", "keep_checkpoints")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One run: an arm, the setting tried, a seed."""

    arm: str
    setting: Values
    seed: int

    @property
    def name(self) -> str:
        """Of its directory: dpo-beta-0.1-seed-0."""
        words = [self.arm, *(f"{key}-{value}" for key, value in self.setting.items()), f"seed-{self.seed}"]
        return "-".join(words).replace("/", "_").replace(" ", "")


def settings(arm: Mapping[str, Any]) -> list[Values]:
    """Every combination of the values in an arm's `sweep`; one empty setting where there is none."""
    sweep = arm.get("sweep") or {}
    return [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]


def recipe_of(plan: Plan, versus: Mapping[str, Any], output_dir: str) -> Values:
    """A run's recipe, as values of its stage.

    Args:
        versus: the values of the whole recipe.

    Raises:
        UsageError: what the run learns from is no whole number of its steps.
    """
    arm = versus["arms"][plan.arm]
    stage = arm["stage"]
    own = {key: value for key, value in arm.items() if key not in ("stage", "sweep")} | plan.setting
    ranking = [name for name in versus["scorers"] if is_function(name)]
    shared: Values = {
        "stage": stage,
        "output_dir": output_dir,
        "model_name_or_path": versus["baseline"],
        "seed": plan.seed,
        "scorers": list(dict.fromkeys([versus["selector"], *ranking])),
        "max_eval_prompts": versus["max_eval_prompts"],
        "eval_steps": versus["eval_steps"],
        "save_steps": versus["eval_steps"],
    }
    shared |= {key: first(versus[name]) for key, name in STAGES[stage].items()}
    if STAGES[stage]["dataset_name"] == "dataset_name":
        shared |= {
            one.name: versus[one.name] for one in fields(DataArguments) if versus[one.name] != one.default
        }
    if versus["load_best_model_at_end"]:
        shared |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_score"}
        shared |= {"greater_is_better": True}
    if versus["use_cpu"]:
        shared["use_cpu"] = True
    return shared | own | _length(stage, own, versus["total_episodes"], plan.arm)


def is_function(scorer: str) -> bool:
    """Whether a scorer can also measure along the way: not people, nor a judge, who asks for pairs."""
    return scorer != "judge" and not scorer.endswith((".sqlite", ".db"))


def first(value: Any) -> Any:
    """The only one of a list."""
    return value[0] if isinstance(value, list) else value


def _length(stage: str, own: Mapping[str, Any], episodes: int, arm: str) -> Values:
    """So many steps that the run learns from `episodes` answers; a pair has two."""
    schema = schema_of(stage_class(stage))

    def value(key: str) -> int:
        return int(own.get(key, schema[key].default))

    step = value("per_device_train_batch_size") * value("gradient_accumulation_steps")
    step *= 2 if stage == "dpo" else 1
    read = episodes * (value("num_iterations") if "num_iterations" in schema else 1)  # each so many times
    if step < 1 or read < step or read % step:
        raise UsageError(
            f"{arm}: total_episodes {episodes} is no whole number of its steps of {step} answers "
            "(per_device_train_batch_size x gradient_accumulation_steps, and two to a pair)"
        )
    return {"total_episodes": episodes} if stage == "ppo" else {"max_steps": read // step}


# ------------------------------------------------------------------------------------------------ checks


def problems(given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the arms of a recipe, in words."""
    arms: Mapping[str, Any] = given.get("arms") or {}
    if len(arms) < 2:
        yield "needs two arms or more: {dpo: {stage: dpo, ...}, ppo: {stage: ppo, ...}}"
    found = [f"{name}: {problem}" for name, arm in arms.items() for problem in _problems_of(arm)]
    yield from found
    counts = {} if found else {name: len(settings(arm)) for name, arm in arms.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        yield f"try different numbers of settings ({told}): the best of more is the better by luck"


def _problems_of(arm: Any) -> Iterator[str]:
    if not isinstance(arm, dict) or arm.get("stage") not in STAGES:
        yield f"takes a mapping with a stage, one of {', '.join(STAGES)}"
        return
    sweep = arm.get("sweep") or {}
    lists = isinstance(sweep, dict) and all(isinstance(values, list) for values in sweep.values())
    if not lists or not all(len(set(map(repr, values))) == len(values) > 0 for values in sweep.values()):
        yield "sweep takes lists of values, each once: {beta: [0.1, 0.3]}"
        return
    yield from (f"{key} is both fixed and swept; delete one" for key in sweep if key in arm)
    held = {*COMMON, *LENGTH, *STAGES[arm["stage"]], *(one.name for one in fields(DataArguments))}
    for key in (key for key in [*arm, *sweep] if key in held):
        yield f"{key} is shared by all arms: it follows from the keys of versus; delete it"
    schema = schema_of(stage_class(arm["stage"]))
    for setting in settings(arm):
        own = {key: value for key, value in arm.items() if key not in ("stage", "sweep")} | setting
        found: list[str] = []
        check_entries(
            [Entry(key, value, "") for key, value in own.items() if key not in held], schema, found, []
        )
        yield from dict.fromkeys(problem.removeprefix(": ") for problem in found)
