"""Every command of every README runs, as a reader would type it; the long ones with their smoke budget."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *sorted([*ROOT.glob("*/README.md"), *ROOT.glob("recipes/*/README.md")])]
# What a command becomes here. `make test` is what runs this test, and `make demo` is the folder run.
LONG = {"make demo": "trueup run recipes/lab"}
NOT_RUN = re.compile(r"^(make test|git |cd |pip |python3? -m (venv|pip)|source )")


def commands(readme: Path) -> list[str]:
    """The lines of a README's bash blocks, without comments; a backslash joins lines."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    stripped = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return [line for line in stripped if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to stand in: it sees the shipped recipes, and its runs are its own."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "recipes").symlink_to(ROOT / "recipes")
    return desk


def _smoke(command: str) -> list[str]:
    """The command as run here: the smoke budget, and its directories where one is named."""
    words = shlex.split(LONG.get(command, command))
    recipe = "run" in words or ("inspect" in words and words[2].endswith(".yaml"))
    if recipe and "--dry-run" not in words:
        words += ["--budget", "smoke"]
    words = [re.sub(r"^runs/lab(?=/|$)", "runs/lab.smoke", word) for word in words]
    assert words[0] == "trueup", f"the README names a command this test cannot run: {command}"
    return [sys.executable, "-m", "trueup.app", *words[1:]]


def test_the_root_readme_shows_the_road() -> None:
    assert {"make demo", "make test", "trueup run recipes/lab"} <= set(commands(ROOT / "README.md"))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_readme_run(desk: Path, readme: Path) -> None:
    """The root's come first and leave the runs that the others may look at."""
    for command in [line for line in commands(readme) if not NOT_RUN.match(line)]:
        done = subprocess.run(
            _smoke(command),
            cwd=desk,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_readmes_name_only_what_exists(readme: Path) -> None:
    """Links lead somewhere, `make` targets exist, and nothing tells of the machine it was written on."""
    text = readme.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (readme.parent / target).exists(), f"{readme.name} links to {target}"
    for target in re.findall(r"^make (\w+)", "\n".join(commands(readme)), re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert os.path.expanduser("~") not in text
