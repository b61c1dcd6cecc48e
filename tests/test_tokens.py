"""What `trueup inspect RECIPE` shows is what is trained."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sft_models import ROWS

from trueup.app.terminal import printable
from trueup.app.tokens import show_tokens
from trueup.recipes.errors import UsageError


def shown(recipe: Any, rows: int = 2, **console: Any) -> str:
    out = io.StringIO()
    show_tokens(recipe, rows, Console(file=out, width=200, highlight=False, **console))
    return out.getvalue()


WHOLE = {"validation_split_size": 0, "test_split_size": 0}


def test_brackets_stand_around_what_is_trained(recipe: Any) -> None:
    text = shown(recipe([ROWS[2], ROWS[3], ROWS[4]], **WHOLE))
    assert "<|bos|><|user|>what is 2 times 2?<|end|><|assistant|>[it is 4 indeed indeed<|end|>]" in text
    assert "2. " in text
    assert "3. " not in text
    assert "3 rows" in text
    assert "of them trained" in text


def test_each_document_of_a_packed_row_is_shown_by_itself(recipe: Any) -> None:
    text = shown(recipe([ROWS[2], ROWS[3]], packing=True, **WHOLE), rows=1)
    for number in (2, 3):
        assert (
            f"<|bos|><|user|>what is {number} times {number}?<|end|><|assistant|>[it is {number**2}" in text
        )


def test_colours_mark_it_on_a_terminal(recipe: Any) -> None:
    text = shown(recipe([ROWS[2]], **WHOLE), force_terminal=True, color_system="standard")
    assert "\x1b[1;32m" in text  # bold green
    assert "[it is" not in text


def test_it_counts_what_truncation_takes(recipe: Any) -> None:
    long = {"messages": [{"role": "user", "content": "what " * 70}, ROWS[0]["messages"][1]]}
    text = shown(recipe([*ROWS[:5], long], max_length=30, **WHOLE))
    assert "truncated to 30: 1 rows" in text
    assert "left out: 1 rows" in text


def test_control_characters_of_the_data_are_shown_not_obeyed(recipe: Any) -> None:
    row = {
        "messages": [{"role": "user", "content": "\x1b[2J"}, {"role": "assistant", "content": "é\n[bold]x"}]
    }
    text = shown(recipe([row], **WHOLE))
    assert "\\x1b[2J" in text
    assert "[bold]x" in text
    assert "\u23ce" in text
    assert "\x1b" not in text


@pytest.mark.usefixtures("toy_stage")
def test_a_stage_without_tokens_says_so(write_recipe: Callable[..., Path]) -> None:
    from trueup.recipes.reader import read_recipe

    with pytest.raises(UsageError, match="stage toy has no tokens to show"):
        show_tokens(read_recipe(write_recipe("stage: toy\noutput_dir: runs/toy\n")), 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\u202eb", "a\\u202eb"),
        ("\x9b2J\r", "\\x9b2J\\x0d"),
        ("ümläut \U0001f600", "ümläut \U0001f600"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected
