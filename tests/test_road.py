"""The whole road at the smoke budget: killed anywhere it ends the same."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trueup.recipes.directory import identity

ROOT = Path(__file__).resolve().parent.parent
ROAD = [sys.executable, "-m", "trueup.app", "run", str(ROOT / "recipes" / "lab"), "--budget", "smoke"]
ENDS = tuple(
    f"runs/lab.smoke/{stage}" for stage in ("base", "sft", "pairs", "reward", "dpo", "ppo", "compare")
)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the road was walked without a stop."""
    desk = tmp_path_factory.mktemp("walked")
    subprocess.run(ROAD, cwd=desk, check=True, capture_output=True, timeout=900)
    return desk


def _walk_with_kills(desk: Path, chance: random.Random, kills: int, whole_group: bool) -> None:
    """Start the road, kill -9 it at a random moment, and again; then let it end."""
    for _ in range(kills):
        child = subprocess.Popen(
            ROAD, cwd=desk, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            child.wait(timeout=chance.uniform(3, 40))
        except subprocess.TimeoutExpired:
            (os.killpg if whole_group else os.kill)(child.pid, signal.SIGKILL)
            child.wait()
    subprocess.run(ROAD, cwd=desk, check=True, capture_output=True, timeout=900)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("whole_group", [True, False], ids=["all of it", "only the runner"])
def test_killed_anywhere_the_road_ends_the_same(walked: Path, tmp_path: Path, whole_group: bool) -> None:
    _walk_with_kills(tmp_path, random.Random(whole_group), kills=5, whole_group=whole_group)
    for end in ENDS:
        assert identity(tmp_path / end) == identity(walked / end)
    assert not list(tmp_path.rglob(".*.partial-*")) or whole_group
