"""Every recipe that is shipped reads without a mistake, with each of its budgets, and explains itself."""

import re
from pathlib import Path

import pytest

from trueup.app.runner import order, read_folder
from trueup.recipes.reader import parse_yaml, read_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_reads_with_every_budget(path: Path) -> None:
    budgets = next(entry.value for entry in parse_yaml(path) if entry.key == "budgets")
    assert "smoke" in budgets
    recipe = read_recipe(path)
    assert not recipe.notes, "a shipped recipe has no retired keys"
    for budget in budgets:
        assert read_recipe(path, budget=budget).values["output_dir"] != recipe.values["output_dir"]
    assert re.match(r"# \w", path.read_text()), "it begins by saying what it is"


@pytest.mark.parametrize("folder", sorted({path.parent for path in RECIPES}), ids=lambda path: path.name)
def test_a_folder_can_be_ordered(folder: Path) -> None:
    assert len(order(read_folder(folder, None))) == len(list(folder.glob("*.yaml")))
