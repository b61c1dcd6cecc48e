"""Pretraining runs held against each other: which they are, what is said to differ, and their plots."""

import base64
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import write_toy_model
from test_ladder import main_exits, said

from trueup.eval.ladder import Ladder, ladder, runs_below
from trueup.eval.ladder_plots import LINE, curves, read_logs, start, transfer

TEXT = [{"name": "lab/text", "split": split, "sha256": split * 2} for split in ("train", "validation")]
RECIPE = {"hidden_size": 128, "learning_rate": 3e-3, "init": "gpt2", "warmup_steps": 30, "seed": 0}


def write_run(path: Path, bits: float, data: Any = TEXT, steps: int = 200, **recipe: Any) -> Path:
    """A directory as pretraining leaves it, with weights of two numbers."""
    write_toy_model(path)
    rows: list[dict[str, Any]] = []
    for step in range(2, steps + 1, 2):
        rows.append({"step": step, "loss": 7 * step**-0.3 + bits, "grad_norm": 9 / step + bits})
    rows.append({"step": steps, "bits_per_byte": bits, "above_floor": bits - 0.2})
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "stage": "pretrain", "identity": path.name, "parents": {}, "data": data, "metrics": rows[-1],
        "recipe": RECIPE | {"output_dir": str(path)} | recipe,
        "started": "2026-01-01T00:00:00Z", "seconds": 90.0, "tokens": 10,
    }  # fmt: skip
    (path / "trueup.json").write_text(json.dumps(record))
    return path


def read(folder: Path) -> Ladder:
    return ladder(runs_below(folder))


def write_sweep(folder: Path, inits: tuple[str, ...] = ("gpt2", "mup")) -> None:
    """Two widths, three rates: the best rate halves with the width, and with muP it does not."""
    for init in inits:
        for width in (128, 256):
            best = 0.01 if init == "mup" or width == 128 else 0.005
            for rate in (0.005, 0.01, 0.02):
                changed = {"init": init, "hidden_size": width, "learning_rate": rate}
                write_run(folder / f"{init}-{width}-{rate}", 1.0 + abs(best - rate), **changed)


def test_runs_are_told_apart_by_what_differs_from_the_baseline(tmp_path: Path) -> None:
    folder = tmp_path / "why"
    write_run(folder / "a", 0.9, warmup_steps=0)
    write_run(folder / "baseline", 0.8)
    write_run(folder / "b", 0.7, sample_prompts=["Once"], learning_rate=1e-2)
    (group,) = read(folder).groups
    assert [(run.name, run.difference) for run in group.runs] == [
        ("b", 'learning_rate: 0.01, sample_prompts: ["Once"]'),
        ("baseline", ""),
        ("a", "warmup_steps: 0"),
    ]
    assert group.runs[0].parameters == 2
    text = said(read(folder))
    assert re.search(r"baseline +0\.8000 +0\.6000 +baseline", text)
    assert "lm-eval" not in text, "runs beside each other are no ladder"


def test_only_runs_of_one_folder_on_one_text_are_held_against_each_other(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 0.9)
    write_run(tmp_path / "two", 0.8)
    write_run(tmp_path / "other", 0.1, data=[TEXT[0] | {"sha256": "another"}, TEXT[1]])
    write_run(tmp_path / "below" / "three", 0.2)
    found = read(tmp_path)
    assert [[run.name for run in group.runs] for group in found.groups] == [["two", "one"]]
    assert found.climbs, "the others stand on the ladder"


def rings(figure: Any) -> dict[str, list[float]]:
    """Title of each panel -> the rate that is ringed of each line, narrow to wide."""
    return {
        axes.get_title(): [line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 13]
        for axes in figure.axes
    }


def names(figure: Any) -> list[list[str]]:
    """The lines' names in each panel."""
    return [sorted(text.get_text() for text in axes.texts) for axes in figure.axes]


def test_a_sweep_of_rates_shows_how_they_transfer(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (group,) = read(tmp_path).groups
    assert group.tries_rates
    figure = transfer(group)
    assert rings(figure) == {"Standard parametrisation": [0.01, 0.005], "muP": [0.01, 0.01]}
    assert names(figure) == [["width 128", "width 256"]] * 2


@pytest.mark.parametrize("left", ["gpt2-128-0.01", "mup-256-0.02"])
def test_some_runs_of_a_sweep_make_a_plot_too(tmp_path: Path, left: str) -> None:
    """While the others still train, or have diverged."""
    write_sweep(tmp_path)
    for path in tmp_path.iterdir():
        if path.name not in (left, "gpt2-256-0.005"):
            (path / "trueup.json").unlink()
    (group,) = read(tmp_path).groups
    assert sum(map(len, names(transfer(group)))) == 2


def test_labels_do_not_cover_each_other(tmp_path: Path) -> None:
    for name in "abcdefg":
        write_run(tmp_path / name, 0.8 + 1e-6 * ord(name))
    (group,) = read(tmp_path).groups
    for plot in (curves, start):
        places = sorted(text.get_position()[1] for text in plot(group, read_logs(group)).axes[-1].texts)
        assert len(places) == 7
        assert min(b - a for a, b in pairwise(places)) >= LINE * 0.999
        assert places[-1] <= 1.001


def test_the_page_holds_its_plots_for_light_and_dark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "<b>a", 0.9, warmup_steps=0)
    write_run(tmp_path / "baseline", 0.8)
    (tmp_path / "baseline" / "log.jsonl").unlink()  # of a directory that was copied in part
    write_sweep(tmp_path / "mup", ("gpt2",))
    main_exits("report", str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;a" in page
    assert "<b>a" not in page
    pictures = [base64.b64decode(one) for one in re.findall(r"svg\+xml;base64,([^\"]+)", page)]
    assert len(pictures) == 2 * (2 + 3)  # curves and start of both, transfer of one; light and dark
    assert all(picture.startswith(b"<?xml") for picture in pictures)
    assert page.count("*/log.jsonl</code>") == 2 * 2
    capsys.readouterr()
    main_exits("report", str(tmp_path), "--json")
    assert [len(group["runs"]) for group in json.loads(capsys.readouterr().out)["groups"]] == [2, 6]


def test_many_runs_have_no_curves(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    main_exits("report", str(tmp_path))
    assert (tmp_path / "report.html").read_text().count("<figure>") == 1
