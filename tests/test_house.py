"""House rules that a machine can check: floors, size of functions, imports without work, real types."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trueup.app.cli import app

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"recipes": 1, "base": 2, "eval": 3, "sft": 4, "preference": 4, "app": 5}
SOURCES = sorted(path for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))


def _imported_folders(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trueup."):
            names.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trueup.")}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_and_functions_fit_a_screen(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here = path.relative_to(ROOT).parts[0]
    up = {name for name in _imported_folders(tree) if name != here and FLOORS[name] >= FLOORS[here]}
    assert not up, f"{here} must not import {up}"
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 60
    ]
    assert not long


def test_the_command_starts_without_heavy_packages() -> None:
    heavy = ("torch", "transformers", "datasets", "trl", "matplotlib")
    code = f"import sys, trueup.app.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", ["eval", "app", "serve", "export", "exam"])
def test_the_options_of_a_verb_fit_a_terminal(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80"}).output
    assert "--" in shown
    assert "…" not in shown, "a name is cut"
    assert max(map(len, shown.splitlines())) <= 80


def test_a_second_copy_of_a_package_cannot_be_imported() -> None:
    """From the repository's root `import base` would make a second copy of every class."""
    done = subprocess.run(
        [sys.executable, "-c", "import base"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "import trueup.base, not base" in done.stderr


def test_the_type_checker_sees_our_code(tmp_path: Path) -> None:
    """mypy passes vacuously when it cannot resolve trueup.*; a planted error must be found."""
    planted = tmp_path / "planted.py"
    planted.write_text("from trueup.recipes.errors import TrueupError\n\nTrueupError.exit_code = 'one'\n")
    environment = {**os.environ, "MYPYPATH": str(ROOT / ".typing")}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(planted)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "Incompatible types in assignment" in done.stdout


def test_every_package_is_listed_for_installation() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        "trueup." + ".".join(path.parent.relative_to(ROOT).parts)
        for path in SOURCES
        if path.name == "__init__.py"
    }
    assert listed == found
    assert set(project["tool"]["setuptools"]["package-dir"]) == found
