"""The lab's data sets by name, the preference labeller, and the command."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trueup.recipes.errors import UsageError
from trueup.recipes.lab import datasets, preferences
from trueup.recipes.lab.demonstrations import ERRING_SHARE
from trueup.recipes.lab.gold import STYLE, SUBSTANCE, TRUTH_COLUMNS, WEIGHTS, gold_parts
from trueup.recipes.lab.preferences import expected_accuracy, label_ceiling, label_probability, pair
from trueup.recipes.lab.world import SPLITS


@pytest.mark.parametrize("name", datasets.NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_json_with_all_columns_of_one_type(name: str, split: str) -> None:
    rows = list(itertools.islice(datasets.rows(name, split), 60))
    assert len(rows) == 60
    shape = {key: type(value) for key, value in rows[0].items()}
    for row in rows:
        assert {key: type(value) for key, value in row.items()} == shape
        assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("name", datasets.NAMES)
def test_rows_are_the_same_again_and_differ_by_seed(name: str) -> None:
    def first(seed: int) -> list[datasets.Row]:
        return list(itertools.islice(datasets.rows(name, "train", seed=seed), 30))

    assert first(0) == first(0) != first(1)


@pytest.mark.parametrize(
    ("name", "split", "arguments", "message"),
    [
        ("lab/chats", "train", {}, "'lab/chats' is no data set of the lab. Did you mean 'lab/chat'?"),
        ("lab/chat", "trian", {}, "'trian' is no split of lab/chat. Did you mean 'train'?"),
        ("lab/chat", "train", {"row": 3}, "'row' is no argument of lab/chat. Did you mean 'rows'?"),
        ("lab/text", "train", {"documents": 3, "megabytes": 1}, "documents and megabytes exclude"),
        ("lab/chat", "train", {"style": "rude"}, "must be 'mixed' or 'clean'"),
        ("lab/chat", "train", {"errors": 0.5}, "errors must be at least 0 and below 0.5"),
        ("lab/chat", "train", {"rows": "many"}, "rows is 'many'; it must be of type int | None"),
        ("lab/preferences", "train", {"flip": True}, "flip is True; it must be of type float"),
        ("lab/prompts", "test", {"rows": 0}, "must be above 0"),
        ("lab/facts", "test", {"choices": 9}, "between 2 and 7"),
        ("lab/preferences", "train", {"temperature": 0}, "temperature must be above 0"),
        ("lab/preferences", "train", {"flip": 0.7}, "flip must lie between 0 and 0.5"),
    ],
)
def test_mistakes_are_named_at_once(
    name: str, split: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        datasets.rows(name, split, **arguments)


def test_sizes() -> None:
    texts = list(datasets.rows("lab/text", "train", megabytes=0.1))
    assert 0.1e6 <= sum(len(row["text"]) for row in texts) < 0.1e6 + 600
    assert len(list(datasets.rows("lab/text", "test", documents=7))) == 7
    assert len(list(datasets.rows("lab/prompts", "test"))) == 1_680


def test_fingerprints_follow_every_argument_and_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    base = datasets.fingerprint("lab/chat", "train")
    assert base == datasets.fingerprint("lab/chat", "train", seed=0, errors=ERRING_SHARE)
    others = [
        datasets.fingerprint("lab/chat", "test"),
        datasets.fingerprint("lab/chat", "train", seed=1),
        datasets.fingerprint("lab/prompts", "train"),
    ]
    monkeypatch.setattr(datasets, "_source_hash", lambda: b"another generator")
    assert len({base, *others, datasets.fingerprint("lab/chat", "train")}) == 5


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from trueup.recipes.lab.datasets import fingerprint; print(fingerprint('lab/text', 'train'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == datasets.fingerprint("lab/text", "train")


def parts_of(rows: list[datasets.Row]) -> dict[str, list[float]]:
    columns = {name: [row[name] for row in rows] for name in TRUTH_COLUMNS}
    return gold_parts(rows, [row["messages"] for row in rows], **columns)


def test_demonstrations_err_in_substance_and_hardly_in_style() -> None:
    rows = list(datasets.rows("lab/chat", "train", rows=2_800))
    parts = parts_of(rows)
    lost = {name: 1 - sum(parts[name]) / len(rows) for name in WEIGHTS}
    assert sum(WEIGHTS[name] * lost[name] for name in STYLE) < 0.01
    faulty = [not all(parts[name][row] for name in SUBSTANCE) for row in range(len(rows))]
    assert sum(faulty) / len(rows) == pytest.approx(ERRING_SHARE, abs=0.03)
    faultless = list(datasets.rows("lab/chat", "train", rows=2_800, errors=0))
    assert all(
        sum(values) == len(faultless) for name, values in parts_of(faultless).items() if name in SUBSTANCE
    )


def test_clean_answers_without_errors_are_perfect() -> None:
    rows = list(datasets.rows("lab/chat", "train", rows=700, errors=0, style="clean"))
    assert all(sum(values) == len(rows) for values in parts_of(rows).values())


def test_facts_offer_the_truth_among_rivals() -> None:
    for row in datasets.rows("lab/facts", "test"):
        assert len(set(row["choices"])) == 4
        assert 0 <= row["gold"] < 4
        assert not row["context"].endswith(" ")


def test_pairs_are_labelled_as_stated() -> None:
    """Labels come from the stated probabilities, and the better answer wins as often as they say."""
    pairs = [pair("train", index, temperature=0.2, flip=0.1) for index in range(1_500)]
    for one in pairs:
        difference = one.gold_chosen - one.gold_rejected
        assert difference != 0
        assert one.p_label == pytest.approx(label_probability(difference, 0.2, 0.1))
        assert one.differs
    won = sum(one.gold_chosen > one.gold_rejected for one in pairs) / len(pairs)
    ceiling = label_ceiling([one.gold_chosen - one.gold_rejected for one in pairs], 0.2, 0.1)
    assert won == pytest.approx(ceiling, abs=0.04)
    assert sum(bool({*one.differs} & {*SUBSTANCE}) for one in pairs) / len(pairs) > 0.7


def test_the_ceiling_in_closed_form() -> None:
    # Two kinds of pairs, half each: log-odds ln 3 (so 3/4) and ln 9 (so 9/10).
    gaps = [math.log(3), -math.log(9)] * 50
    assert label_ceiling(gaps, temperature=1, flip=0) == pytest.approx((0.75 + 0.9) / 2)
    assert label_ceiling(gaps, temperature=1, flip=0.2) == pytest.approx((0.75 + 0.9) / 2 * 0.6 + 0.2)
    assert label_ceiling(gaps, temperature=1, flip=0.5) == pytest.approx(0.5)
    assert label_ceiling(gaps, temperature=1e-3, flip=0.1) == pytest.approx(0.9)


def test_expected_accuracy_reaches_the_ceiling_only_for_gold_itself() -> None:
    pairs = [pair("validation", index) for index in range(400)]
    p_label = [one.p_label for one in pairs]
    by_gold = [one.gold_chosen > one.gold_rejected for one in pairs]
    gaps = [one.gold_chosen - one.gold_rejected for one in pairs]
    ceiling = label_ceiling(gaps, 0.15, 0.1)
    assert expected_accuracy(by_gold, p_label) == pytest.approx(ceiling)
    assert expected_accuracy([not right for right in by_gold], p_label) == pytest.approx(1 - ceiling)


def test_dials_do_not_change_the_pairs_and_ties_are_counted() -> None:
    cold, warm = pair("train", 5, temperature=0.01, flip=0), pair("train", 5, temperature=5, flip=0.4)
    assert {cold.chosen, cold.rejected} == {warm.chosen, warm.rejected}
    gaps, differing, ties = preferences.differences("train", 200)
    assert len(gaps) == 200
    assert ties > 0
    assert differing["correct"] > differing["courteous"]


def trueup_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from trueup.app.lab import lab; lab()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_command_prints_the_floor() -> None:
    shown = json.loads(trueup_lab("entropy", "--documents", "200", "--json").stdout)
    assert shown["all"]["documents"] == 200
    assert shown["all"]["bits_per_byte"] == pytest.approx(shown["all"]["bits"] / shown["all"]["bytes"])


def test_command_writes_whole_files_only(tmp_path: Path) -> None:
    target = tmp_path / "new" / "prompts.jsonl"
    assert (
        trueup_lab("write", "lab/prompts", "--split", "test", "--rows", "20", "--to", str(target)).returncode
        == 0
    )
    assert [json.loads(line) for line in target.read_text().splitlines()] == list(
        datasets.rows("lab/prompts", "test", rows=20)
    )
    assert [path.name for path in target.parent.iterdir()] == ["prompts.jsonl"]


def test_command_shows_samples_and_the_ceiling() -> None:
    assert "user" in trueup_lab("sample", "lab/chat", "--rows", "2").stdout
    ceilings = json.loads(trueup_lab("ceiling", "--pairs", "200", "--json").stdout)
    assert ceilings["pairs"] == 200
    assert all(0.5 <= row["ceiling"] <= 1 for row in ceilings["ceilings"])
