"""`trueup run`: the order of stages, what is skipped, what a failure says, and exit codes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trueup.app.cli import main
from trueup.app.runner import order, read_folder, run_folder
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import RecipeError

pytestmark = pytest.mark.usefixtures("toy_stage")
LAUNCHER = f"{sys.executable} {Path(__file__).with_name('toy_launcher.py')}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three recipes whose names sort against the order they need: a <- b <- c."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "z_first.yaml").write_text("stage: toy\noutput_dir: runs/a\n")
    (folder / "m_second.yaml").write_text(
        "stage: toy\noutput_dir: runs/b\nmodel_name_or_path: runs/a\nlearning_rate: 0.5\n"
    )
    (folder / "a_third.yaml").write_text(
        "stage: toy\noutput_dir: runs/c\nmodel_name_or_path: runs/b\nlearning_rate: 0.7\n"
        "budgets: {smoke: {max_steps: 1}}\n"
    )
    return folder


def _run(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    run_folder(folder, budget=None, dry_run=False, launcher=LAUNCHER, as_json=True)
    rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return rows


def test_parents_come_first(folder: Path) -> None:
    names = [recipe.source.name for recipe in order(read_folder(folder, None)) if recipe.source]
    assert names == ["z_first.yaml", "m_second.yaml", "a_third.yaml"]


def test_circles_and_doubles_are_refused(folder: Path) -> None:
    (folder / "z_first.yaml").write_text("stage: toy\noutput_dir: runs/a\nmodel_name_or_path: runs/c\n")
    with pytest.raises(UsageError, match=r"wait for one another: .*yaml -> .*yaml"):
        order(read_folder(folder, None))
    (folder / "z_first.yaml").write_text("stage: toy\noutput_dir: ./runs/b\n")
    with pytest.raises(UsageError, match="both write"):
        order(read_folder(folder, None))


def test_mistakes_of_all_files_are_told_together(folder: Path) -> None:
    (folder / "z_first.yaml").write_text("stage: toy\nsed: 1\n")
    (folder / "m_second.yaml").write_text("- not\n- a recipe\n")
    with pytest.raises(RecipeError) as caught:
        read_folder(folder, None)
    assert len(caught.value.problems) == 3
    with pytest.raises(UsageError, match="holds no recipes"):
        read_folder(folder.parent, None)


@pytest.mark.timeout(120)
def test_a_folder_runs_skips_and_redoes_what_changed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _run(folder, capsys)
    assert [row["status"] for row in first] == ["done", "done", "done"]
    assert [row["status"] for row in _run(folder, capsys)] == ["complete"] * 3
    (folder / "m_second.yaml").write_text(
        "stage: toy\noutput_dir: runs/b\nmodel_name_or_path: runs/a\nlearning_rate: 0.6\n"
    )
    third = _run(folder, capsys)
    assert [row["status"] for row in third] == ["complete", "done", "done"]
    assert third[1]["identity"] != first[1]["identity"]
    assert Path("runs/b.previous/trueup.json").exists()
    assert "runs/b: done" in Path("runs/b.work/log.txt").read_text()


def test_the_first_failure_stops_the_folder_and_names_its_log(folder: Path) -> None:
    Path("runs/b").mkdir(parents=True)
    Path("runs/b/precious").write_text("not ours")
    with pytest.raises(
        TrueupError, match=r"stage toy .*m_second\.yaml.* failed; its log: runs/b\.work/log\.txt"
    ):
        run_folder(folder, budget=None, dry_run=False, launcher=LAUNCHER, as_json=False)
    assert "was not written by trueup" in Path("runs/b.work/log.txt").read_text()
    assert not Path("runs/c").exists()


def test_a_budget_every_recipe_must_have(folder: Path) -> None:
    with pytest.raises(RecipeError, match="no budget 'smoke'"):
        read_folder(folder, "smoke")


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "nowhere.yaml"], 2, "trueup: nowhere.yaml: no such recipe"),
        (["run", "recipes", "--seed", "1"], 2, "can be overridden for one recipe, not for a folder"),
        (["run", "recipes", "--budget", "smoke"], 2, "no budget 'smoke'"),
        (["inspect", "nowhere"], 2, "nowhere: no such model directory"),
        (["inspect", "recipes"], 1, "config.json is missing"),
        (["pretrain"], 2, "name a recipe: trueup pretrain --config FILE"),
        (["pretrain", "--config", "recipes/z_first.yaml"], 2, "is for `trueup toy`, not `trueup pretrain`"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_exit_codes_and_one_message(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_debug_shows_where(folder: Path) -> None:
    with pytest.raises(UsageError):
        main(["run", "nowhere.yaml", "--debug"])


def test_dry_run_shows_the_plan_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", str(folder), "--dry-run"])
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert shown.index("runs/a") < shown.index("runs/b") < shown.index("runs/c")
    assert not Path("runs").exists()


def test_inspect_shows_the_lineage(
    folder: Path, capsys: pytest.CaptureFixture[str], trained: Callable[[Path], list[str]]
) -> None:
    identities = trained(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["inspect", "runs/c"])
    shown = capsys.readouterr().out
    positions = [shown.index(name[:12]) for name in reversed(identities)]
    assert positions == sorted(positions)  # the child first, its parents below
    assert "model_name_or_path" in shown
    with pytest.raises(SystemExit):
        main(["inspect", "runs/c", "--json"])
    assert json.loads(capsys.readouterr().out)["lineage"]["identity"] == identities[-1]


@pytest.fixture
def trained() -> Callable[[Path], list[str]]:
    """Run a folder's recipes in this process; returns their identities in order."""
    from trueup.app.runner import run_stage
    from trueup.recipes.directory import identity

    def train(folder: Path) -> list[str]:
        return [identity(run_stage(recipe).output_dir) for recipe in order(read_folder(folder, None))]

    return train
