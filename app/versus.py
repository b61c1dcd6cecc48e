"""The versus stage: methods of alignment against each other, from one start to a verdict, by one recipe.

    stage: versus
    baseline: runs/lab/sft
    arms:
      dpo: {stage: dpo, learning_rate: 1e-4, sweep: {beta: [0.05, 0.1, 0.3]}}
      ppo: {stage: ppo, learning_rate: 5e-5, sweep: {kl_coef: [0.1, 0.3, 1]}}
    ...

First each arm tries its settings, equally many, with one seed; the one that the selector scores highest on
validation prompts is trained with other seeds; those runs are compared, once, on test prompts. Every run is
an ordinary one: its recipe and its directory lie in `<output_dir>.runs/`, and what is complete stays.
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trueup.app.runner import run_recipes
from trueup.app.versus_plan import Plan, problems, recipe_of, settings
from trueup.base.data import DataArguments, data_fingerprint, data_parents
from trueup.base.stage import key
from trueup.eval.compare import CompareRecipe
from trueup.eval.report import SWEEP, write_report
from trueup.eval.validation import scorer_parents
from trueup.recipes.directory import RECORD, VERDICT, Kind, read_json, write_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import Recipe, read_recipe, scalar
from trueup.recipes.run import Run

COMPARISON = "compare"


@dataclass
class VersusRecipe(CompareRecipe):
    """Train the arms from one start, with equal budgets and equally many settings, and compare them."""

    arms: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Name -> {stage: dpo|kto|ppo|rloo|grpo, sweep: {KEY: [VALUES]}, and keys of that stage "
            "that are its own}.",
            "required": True,
        },
    )
    baseline: str | None = key(
        None, "Model directory all arms start from: their reference, and the baseline.", required=True
    )
    dataset_name: str | None = key(
        None,
        "Prompts: their train split for the online arms, validation for choices, test for the verdict.",
        required=True,
    )
    pairs_dataset_name: str | None = key(None, "Pairs that the offline arms (dpo, kto) learn from.")
    selector: str | None = key(
        None,
        "Scorer that chooses settings on validation prompts: any but what ranks. Registered name, "
        "module:function, or reward model directory.",
        required=True,
    )
    total_episodes: int = key(0, "Answers that each run learns from; a pair has two.", required=True)
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 5],
        metadata={
            "help": "Of the runs that are compared; `seed` is that of the runs that choose the settings."
        },
    )
    max_eval_prompts: int = key(256, "Validation prompts of each evaluation along the way.")
    eval_steps: float = key(0.25, "Share of its steps after which each run is validated, and saved.")
    load_best_model_at_end: bool = key(
        False, "Publish of each run the checkpoint that the selector scores highest, instead of the last."
    )

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        arms = given.get("arms") or {}
        stands_for = {
            name: name for name in arms
        }  # its names and all other keys are checked as of a comparison
        found = super().contradictions(given | ({"arms": stands_for} if "arms" in given else {}))
        found += [("arms", problem) for problem in problems(given)]
        if given.get("selector") in (given.get("scorers") or []):
            found.append(("selector", "is what ranks: an arm chosen by its own judge gets no fair verdict"))
        if not 0 < given.get("eval_steps", 0.25) < 1:
            found.append(("eval_steps", "is a share of each run's steps, such as 0.25"))
        seeds = given.get("seeds", [1])
        if len(set(seeds)) < len(seeds) or not seeds or given.get("seed", 0) in seeds:
            found.append(
                ("seeds", "must be different ones, and none of them `seed`, which chooses the settings")
            )
        stages = {arm.get("stage") for arm in arms.values() if isinstance(arm, dict)}
        if stages & {"dpo", "kto"} and not given.get("pairs_dataset_name"):
            found.append(("pairs_dataset_name", "is missing: it is what dpo and kto learn from"))
        if stages & {"ppo", "rloo", "grpo"} and len(given.get("reward_model_name_or_path") or []) != 1:
            found.append(("reward_model_name_or_path", "must name the one reward model of the online arms"))
        if not found:
            found += _budget_problems(given)
        return found

    def parents(self) -> dict[str, tuple[str, Kind | None]]:
        """The start, the reward model, scorers and selector, and pairs that a stage wrote."""
        found = super().parents() | scorer_parents([str(self.selector)], "selector")
        written = list(data_parents(self._pairs()).values())
        return found | dict(zip(["pairs_dataset_name"], written, strict=False))

    def data(self) -> list[dict[str, Any]]:
        """Fingerprints of the test prompts, and of all that the arms learn from and are chosen by."""
        learned = [data_fingerprint(self, split) for split in ("train", "validation")]
        if self.pairs_dataset_name:
            learned += [data_fingerprint(self._pairs(), split) for split in ("train", "validation")]
        return [*super().data(), *learned]

    def run(self, run: Run) -> None:
        """Try the settings, train the chosen ones, compare, and publish the comparison.

        Raises:
            UsageError: it was started by a launcher, or the arms turn out unequal.
            TrueupError: a run failed; it names the run and its log.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("versus starts each of its runs itself; start it without a launcher")
        folder = run.output_dir.with_name(f"{run.output_dir.name}.runs")
        folder.mkdir(parents=True, exist_ok=True)
        given = _given(run.recipe)
        values = run.recipe.values | {"use_cpu": given.get("use_cpu", False)}
        tried = [
            Plan(name, setting, self.seed) for name, arm in self.arms.items() for setting in settings(arm)
        ]
        self._run(tried, folder, values)
        chosen = {name: _best([plan for plan in tried if plan.arm == name], folder) for name in self.arms}
        final = [Plan(name, chosen[name].setting, seed) for name in self.arms for seed in self.seeds]
        self._run(final, folder, values)
        arms = {name: [str(folder / plan.name) for plan in final if plan.arm == name] for name in self.arms}
        compared = self._compare(arms, folder, given)
        sweep = self._account(tried, list(chosen.values()), final, folder)

        def save(staging: Path) -> None:
            shutil.copytree(compared, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RECORD))
            write_json(staging / SWEEP, sweep)
            write_report(staging)

        record = read_json(compared / RECORD)
        run.publish(save, record["metrics"], tokens=sum(one["tokens"] for one in sweep["runs"]))
        print("\n".join(pair["text"] for pair in read_json(compared / VERDICT)["pairs"]), flush=True)

    def _pairs(self) -> DataArguments:
        return DataArguments(dataset_name=self.pairs_dataset_name)

    def _paths(self) -> dict[str, list[str]]:
        return {}  # a comparison's arms are directories; these are not there yet

    def _run(self, plans: Sequence[Plan], folder: Path, values: dict[str, Any]) -> None:
        recipes = [
            _written(folder, plan.name, recipe_of(plan, values, str(folder / plan.name))) for plan in plans
        ]
        run_recipes(recipes)

    def _compare(self, arms: dict[str, list[str]], folder: Path, given: dict[str, Any]) -> Path:
        inherited = {one.name: given[one.name] for one in fields(CompareRecipe) if one.name in given}
        values = inherited | {"stage": "compare", "arms": arms, "output_dir": str(folder / COMPARISON)}
        run_recipes([_written(folder, COMPARISON, values)])
        return folder / COMPARISON

    def _account(
        self, tried: Sequence[Plan], chosen: Sequence[Plan], final: Sequence[Plan], folder: Path
    ) -> dict[str, Any]:
        """What was tried and how it was chosen: `sweep.json`."""
        return {
            "selector": self.selector,
            "seed": self.seed,
            "seeds": self.seeds,
            "total_episodes": self.total_episodes,
            "load_best_model_at_end": self.load_best_model_at_end,
            "runs": [_figures(plan, folder) | {"tried": plan in tried, "chosen": plan in chosen}
                     for plan in [*tried, *final]],
        }  # fmt: skip


def _budget_problems(given: dict[str, Any]) -> list[tuple[str, str]]:
    """What only shows when the runs are written out."""
    found = []
    schema = {one.name: one.default for one in fields(VersusRecipe)}
    for name in given["arms"]:
        try:
            recipe_of(Plan(name, settings(given["arms"][name])[0], 0), schema | given, "")
        except UsageError as error:
            found.append(("arms", str(error)))
    return found


def _given(recipe: Recipe) -> dict[str, Any]:
    """What somebody wrote. What this machine asks for, each run finds by itself."""
    machine = {key for key, origin in recipe.origin.items() if origin.startswith("this machine")}
    return {key: value for key, value in recipe.written().items() if key not in machine}


def _written(folder: Path, name: str, values: dict[str, Any]) -> Recipe:
    """A recipe as a file that can be run by hand, and read again."""
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {scalar(value)}\n" for key, value in values.items()), encoding="utf-8")
    return read_recipe(path)


def _best(plans: Sequence[Plan], folder: Path) -> Plan:
    """The setting whose run the selector scores highest; of equals the first.

    Raises:
        TrueupError: a run was not validated.
    """
    scores = {}
    for plan in plans:
        metrics = read_json(folder / plan.name / RECORD)["metrics"]
        if not math.isfinite(metrics.get("eval_score", math.nan)):
            raise TrueupError(f"{folder / plan.name}: has no finite eval_score, so it cannot be chosen by it")
        scores[plan.name] = metrics["eval_score"]
    return max(plans, key=lambda plan: scores[plan.name])


def _figures(plan: Plan, folder: Path) -> dict[str, Any]:
    record = read_json(folder / plan.name / RECORD)
    metrics = record["metrics"]
    return {
        "arm": plan.arm,
        "setting": plan.setting,
        "seed": plan.seed,
        "path": str(folder / plan.name),
        "identity": record["identity"],
        "tokens": record["tokens"],
        "seconds": record["seconds"],
        "score": metrics.get("eval_score"),
        "kl": metrics.get("eval_kl"),
        "scorers": {name: value for name, value in metrics.items() if name.startswith("eval_scorers/")},
    }
