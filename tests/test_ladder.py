"""The stage ladder: what it reads, what it says of noise, and that it asks for what is missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compare_models import World
from rich.console import Console

from trueup.app.cli import main
from trueup.eval import compare
from trueup.eval.ladder import BITS, KL, LENGTH, WIN, Ladder, ladder, runs_below
from trueup.eval.ladder_render import print_ladder

Record = dict[str, Any]


def write_run(folder: Path, name: str, stage: str, start: str = "", **changes: Any) -> Path:
    """A directory as a run leaves it, without its weights; its identity is its name.

    Args:
        start: the name of the run it began as, in the same folder.
    """
    path = folder / name
    path.mkdir(parents=True)
    parents = {}
    if start:
        before = json.loads((folder / start / "trueup.json").read_text())
        parents["model_name_or_path"] = {"identity": start, "path": start, **before}
    record = {"stage": stage, "identity": name, "parents": parents, "metrics": {}, "recipe": {}, "data": []}
    record |= {
        "started": f"2026-01-01T00:00:{len(list(folder.iterdir())):02}Z",
        "seconds": 60.0,
        "tokens": 1000,
    }
    (path / "trueup.json").write_text(json.dumps(record | changes))
    return path


def write_lm_eval(path: Path, accuracy: float, stderr: float, **changes: Any) -> None:
    """A file of results as `trueup eval` writes them."""
    (path / "eval").mkdir(exist_ok=True)
    results = {"arc_easy": {"alias": "arc_easy", "acc,none": accuracy, "acc_stderr,none": stderr}}
    name = ".".join(["arc_easy", *changes.get("variant", [])])
    (path / "eval" / f"{name}.json").write_text(json.dumps({"results": results, **changes}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """base -> sft -> dpo, and a reward model."""
    folder = tmp_path / "runs"
    write_run(folder, "base", "pretrain", metrics={"bits_per_byte": 0.2451})
    write_run(folder, "sft", "sft", "base", seconds=120.0)
    write_run(folder, "reward", "reward", "sft", seconds=30.0, tokens=10)
    figures = {"eval_kl": 0.5, "eval_kl_stderr": 0.1, "eval_completions/mean_length": 16.0}
    write_run(folder, "dpo", "dpo", "sft", metrics=figures)
    return folder


def said(found: Ladder) -> str:
    """What the terminal shows."""
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_ladder(found, console)
    return console.export_text()


def step(found: Ladder, name: str) -> Any:
    return next(one for one in found.steps if one.name == name)


def test_what_nobody_measured_is_a_dash_with_the_way_to_get_it(runs: Path) -> None:
    found = ladder(runs_below(runs))
    assert [one.name for one in found.steps] == ["base", "sft", "dpo"]
    assert step(found, "dpo").cells[KL].reach == pytest.approx(0.196)
    text = said(found)
    assert "0.50 ±0.20ᵛ" in text
    assert "ᵛ validation prompts" in text
    assert "– lm-eval: trueup eval DIR" in text
    assert "– win rate, %; KL, nats; length, tokens; repetition, %: trueup compare" in text
    assert "cost: --price" in text
    assert "reward 30 s; all together 4 min 30 s, 3,010 tokens" in text


def test_lm_eval_s_differences_within_noise_are_marked(runs: Path) -> None:
    """Against the model each began as; a score asked for otherwise stands in a line of its own."""
    for name, accuracy in (("base", 0.40), ("sft", 0.41), ("dpo", 0.47)):
        write_lm_eval(runs / name, accuracy, 0.01)
    write_lm_eval(runs / "dpo", 0.9, 0.01, variant=["5-shot"])
    write_lm_eval(runs / "reward", 0.9, 0.01, identity="another model")
    found = ladder(runs_below(runs))
    even = {one.name: one.cells["arc_easy acc"].even for one in found.steps}
    assert even == {"base": False, "sft": True, "dpo": False}
    assert step(found, "dpo").cells["arc_easy acc (5-shot)"].value == 0.9
    assert "0.410 ±0.020 ≈" in said(found)


def test_bits_per_byte_are_those_of_one_text(runs: Path) -> None:
    """The one that most were measured on; the others have lines of their own."""

    def write(name: str, task: str, bits: float) -> None:
        (runs / name / "eval").mkdir(exist_ok=True)
        results = {task: {"bits_per_byte,none": bits, "bits_per_byte_stderr,none": 0.01}}
        (runs / name / "eval" / f"{task}.json").write_text(json.dumps({"results": results}))

    for name, task, bits in (("base", "lab_text", 0.25), ("sft", "lab_text", 0.26), ("sft", "wikitext", 3.0)):
        write(name, task, bits)
    write("dpo", "wikitext", 3.1)
    found = ladder(runs_below(runs))
    shown = {one.name: one.cells.get(BITS) for one in found.steps}
    assert shown["sft"] is not None
    assert (shown["sft"].value, shown["sft"].even, shown["dpo"]) == (0.26, True, None)


def test_runs_of_one_name_are_all_counted(runs: Path) -> None:
    for place in ("a/x", "b/x"):
        write_run(runs / place, "reward", "reward", seconds=1000.0)
    found = ladder(runs_below(runs))
    assert len(found.besides) == 3
    assert found.seconds == 60 + 120 + 60 + 30 + 2000


def test_costs_follow_from_the_price(runs: Path) -> None:
    found = ladder(runs_below(runs), price=3.0)
    assert found.cost(step(found, "sft").seconds) == pytest.approx(0.1)
    assert "0.23 at 3 per hour" in said(found)  # 270 s
    assert "--price" not in said(found)


def test_leftovers_of_runs_are_no_runs(runs: Path) -> None:
    for name in ("dpo.previous", "dpo.work", ".dpo.partial-1", "versus.runs"):
        write_run(runs / name, "x", "dpo")
    assert len(runs_below(runs)) == 4


def test_a_real_comparison_fills_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of one method are one step, with the time of both; best-of-n has no run."""
    monkeypatch.setattr(compare, "write_report", lambda folder: None)
    took = {"seconds": 100.0, "tokens": 50, "started": "2026-01-01T00:00:00Z", "metrics": {}}
    arms = {"dpo": [world.dpo("dpo-0", 1, **took), world.dpo("dpo-1", 2, **took)]}
    keys = {"best_of": [2], "reward_model_name_or_path": str(world.reward)}
    folder = world.compare(arms, **keys, text_dataset_name="lab/text", max_documents=2)
    verdict = json.loads((folder / "verdict.json").read_text())
    found = ladder([Path(arms["dpo"][0]), folder])  # the others lie elsewhere
    assert [one.name for one in found.steps] == ["sft", "dpo (2 seeds)", "best-of-2"]
    dpo = step(found, "dpo (2 seeds)")
    pair = next(one for one in verdict["pairs"] if (one["a"], one["b"]) == ("dpo", "baseline"))
    assert dpo.cells[WIN].value == 100 * pair["rate"]["estimate"]
    assert (dpo.seconds, dpo.tokens) == (200.0, 100)
    assert dpo.cells[BITS].source == "c"
    assert dpo.cells[LENGTH].reach > 0
    assert step(found, "best-of-2").cells[KL].bound
    assert step(found, "best-of-2").cells[KL].value == pytest.approx(0.193, abs=1e-3)


def test_the_command_writes_a_page_that_escapes_names(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs, "<b>ppo", "ppo", "sft")
    main_exits("report", str(runs), "--price", "2")
    page = (runs / "report.html").read_text()
    assert "&lt;b&gt;ppo" in page
    assert "<b>ppo" not in page
    assert "<td>0.07</td>" in page  # 120 s at 2 an hour
    capsys.readouterr()
    main_exits("report", str(runs), "--json")
    assert json.loads(capsys.readouterr().out)["seconds"] == 330
    (runs / "compare").mkdir()
    for name in ("verdict.json", "report.html"):
        (runs / "compare" / name).write_text("{}")
    for place in (runs / "base" / "nothing", runs / "compare"):
        with pytest.raises(SystemExit) as stopped:
            main(["report", str(place)])
        assert stopped.value.code == 2
    assert (runs / "compare" / "report.html").read_text() == "{}", "a comparison keeps its own"


def main_exits(*words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 0


def test_it_needs_no_heavy_package() -> None:
    """It ends every `trueup run`."""
    code = "import sys, trueup.eval.ladder_render; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]
