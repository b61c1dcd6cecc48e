"""The loss curve: on a log scale where that can be, and whole where it cannot."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trueup.base.curves import draw_curve


@pytest.mark.parametrize(("losses", "scale"), [([3.0, 2.0], "log"), ([0.1, -0.2], "linear"), ([], "log")])
def test_losses_below_zero_are_drawn_too(
    losses: list[float], scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Axes] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.extend(self.axes), save(self, *a, **k))
    )
    draw_curve([{"step": step, "loss": loss} for step, loss in enumerate(losses)], tmp_path / "loss.png")
    (axes,) = drawn
    assert axes.get_yscale() == scale
    assert not losses or axes.get_ylim()[0] < min(losses)
