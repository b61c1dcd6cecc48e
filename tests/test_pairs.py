"""The pairs stage: what it writes, that it goes on to the same bits, and what it says when it cannot."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import eval_models
import numpy as np
import pytest

from trueup.base.data import DataArguments, load_data
from trueup.base.interrupt import Interrupted
from trueup.eval.judge import JudgeScorer
from trueup.eval.rendering import plain
from trueup.eval.sampler import SamplingSettings
from trueup.preference import pairs_samples
from trueup.preference.pairs_card import sft_prompts
from trueup.preference.pairs_samples import Candidates, CandidateSampler, Labels, duels, split_seed
from trueup.recipes.directory import RECORD, identity, open_directory, read_json, write_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import RecipeError, read_recipe
from trueup.recipes.run import open_run

WORDS = ["what", "when", "where", "which", "while", "whose", "whom", "why", "how", "who"]


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one batch; a cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(pairs_samples, "CHUNK_BATCHES", 1)


def model() -> Any:
    """A random model that ends soon: many tokens are an end of turn to it."""
    found = eval_models.policy()
    found.generation_config.eos_token_id = [found.config.eos_token_id, *range(60, 160)]
    return found


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    model().save_pretrained(path)
    eval_models.tokenizer().save_pretrained(path)
    return path


def variety(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A score that differs from text to text, and hangs on a column."""
    base = columns.get("truth", [{"add": 0.0}] * len(completions))
    return [sum(map(ord, plain(one))) % 97 / 97 + t["add"] for one, t in zip(completions, base, strict=True)]


def constant(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def speechless(prompts: Any, completions: Any, **columns: Any) -> list[None]:
    return [None] * len(completions)


@pytest.fixture
def recipe(tmp_path: Path, chat: Path) -> Callable[..., Any]:
    """make(name, **keys): a recipe on a few conversations, a fifth of them held out."""
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"{one} {other}" for one in WORDS for other in WORDS[:3]]
    rows = [
        {"prompt": [{"role": "user", "content": text}], "truth": {"add": float(place)}, "p_label": 5.0}
        for place, text in enumerate(texts)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str = "pairs", **keys: Any) -> Any:
        values: dict[str, Any] = {
            "stage": "pairs", "model_name_or_path": str(chat), "dataset_name": str(prompts),
            "output_dir": str(tmp_path / name), "reward_funcs": ["test_pairs:variety"],
            "max_completion_length": 12, "generation_batch_size": 16, "bf16": False, "use_cpu": True,
            "validation_split_size": 0.2, "test_split_size": 0.2,
        } | keys  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "unset"}))
        return read_recipe(path)

    return make


def run(recipe: Any) -> Path:
    opened, stage = open_run(recipe)
    with opened.working():
        stage.run(opened)
    return opened.output_dir


# ---------------------------------------------------------------- what is written


def test_a_directory_of_pairs_is_read_by_the_stages_after_it(recipe: Any, chat: Path) -> None:
    path = run(recipe(pairs_per_prompt=2, label_flip=0.2))
    opened = open_directory(path, "data")
    assert opened.record["parents"]["model_name_or_path"]["identity"] == identity(chat)
    assert opened.record["seeds"] == {"seed": 42} | {
        split: split_seed(42, split) for split in ("train", "validation", "test")
    }
    assert opened.record["tokens"] > 100
    sizes = {}
    for split in ("train", "validation", "test"):
        written = [json.loads(line) for line in (path / f"{split}.jsonl").read_text().splitlines()]
        rows: Any = load_data(DataArguments(dataset_name=str(path)), split, "preference")  # type: ignore[arg-type]
        assert rows.to_list() == written
        sizes[split] = len(written)
    assert opened.record["metrics"]["train_rows"] == sizes["train"] > 10
    for row in rows:
        assert row["prompt"][0]["role"] == "user"
        assert row["chosen"] != row["rejected"]
        assert row["p_label"] in (0.8, pytest.approx(0.2))
        assert (row["score_chosen"] > row["score_rejected"]) == (row["p_label"] > 0.5)
        (score,) = variety(0, [row["chosen"]], truth=[row["truth"]])
        assert row["score_chosen"] == pytest.approx(score)
    assert not (path.with_name("pairs.work") / "samples").exists()
    hub: Any = datasets.load_dataset(str(path))  # what the README's head is for
    assert {split: len(hub[split]) for split in hub} == sizes


def test_the_card_tells_what_the_rows_are(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(recipe(label_temperature=0.5, label_flip=0.1, prompts_per_split={"train": 12, "test": None}))
    card = read_json(path / "card.json")
    assert set(card["splits"]) == {"train", "test"}
    train = card["splits"]["train"]
    rows = [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()]
    assert (train["prompts"], train["completions"]) == (12, 48)
    assert train["rows"] == len(rows) == 12 - train["prompts_without_row"]
    differences = [row["score_chosen"] - row["score_rejected"] for row in rows]
    assert train["score_difference"]["mean"] == pytest.approx(np.mean(differences))
    assert train["score_difference"]["25 %"] == pytest.approx(np.percentile(differences, 25))
    assert train["labels_against_score"] == pytest.approx(np.mean([d < 0 for d in differences]))
    expected = np.mean([max(row["p_label"], 1 - row["p_label"]) for row in rows])
    assert train["label_ceiling"] == pytest.approx(expected)
    assert train["sft_overlap"] is None
    assert "lineage has no SFT stage" in card["sft_data"]
    page, printed = (path / "README.md").read_text(), capsys.readouterr().out
    assert page.startswith("---\nconfigs:")
    for line in page.splitlines():
        if line.startswith("| label ceiling"):
            assert f"{expected:.1%}" in line
            assert line in printed
    assert len(card["examples"]) == 3
    assert plain(card["examples"][0]["chosen"]).splitlines()[0] in page


def test_lengths_are_compared_in_tokens(recipe: Any) -> None:
    path = run(recipe(prompts_per_split={"train": None}, reward_funcs=["length", "test_pairs:variety"],
                      reward_weights=[0.0, 1.0]))  # fmt: skip
    card = read_json(path / "card.json")["splits"]["train"]
    assert -12 < card["length_difference"]["mean"] < 12
    assert 0 < card["chosen_longer"] < 1


def test_the_best_of_n_is_an_example_for_sft(recipe: Any) -> None:
    path = run(recipe(output_form="prompt_completion", prompts_per_split={"train": None}))
    args = DataArguments(dataset_name=str(path), validation_split_size=0, test_split_size=0)
    chats: Any = load_data(args, "train", "messages")
    written = [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()]
    assert [row["messages"] for row in chats] == [row["prompt"] + row["completion"] for row in written]
    mean = read_json(path / "card.json")["splits"]["train"]["score_best_mean"]
    assert mean == pytest.approx(np.mean([row["score"] for row in written]))
    strict = run(recipe("strict", output_form="prompt_completion", prompts_per_split={"train": None},
                        min_score=mean))  # fmt: skip
    assert 0 < read_json(strict / RECORD)["metrics"]["train_rows"] < len(written)


def test_plain_prompts_give_plain_pairs(recipe: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "plain.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{word} is"}) + "\n" for word in WORDS))
    path = run(recipe(dataset_name=str(prompts), prompts_per_split={"train": None}))
    row = json.loads((path / "train.jsonl").read_text().splitlines()[0])
    assert all(isinstance(row[name], str) for name in ("prompt", "chosen", "rejected"))


def test_overlap_with_the_prompts_the_model_learnt_from(recipe: Any, tmp_path: Path) -> None:
    """The lineage names the SFT data; a model made from an SFT model has it too."""
    data = tmp_path / "chats.jsonl"
    said = [f"{one} {WORDS[0]}" for one in WORDS]
    data.write_text(
        "".join(
            json.dumps(
                {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "."}]}
            )
            + "\n"
            for text in said
        )
    )
    keys = {"dataset_name": str(data), "validation_split_size": 0.0, "test_split_size": 0.0}
    from trueup.base.data import data_fingerprint

    sft = tmp_path / "sft"
    model().save_pretrained(sft)
    eval_models.tokenizer().save_pretrained(sft)
    record = {
        "stage": "sft", "identity": identity(sft), "parents": {},
        "recipe": keys | {"dataset_form": "messages"},
        "data": [data_fingerprint(DataArguments(**keys), "train")],
    }  # fmt: skip
    write_json(sft / RECORD, record)
    path = run(recipe(model_name_or_path=str(sft)))
    card = read_json(path / "card.json")
    assert card["sft_data"] == str(data)
    rows = [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()]
    shared = np.mean([row["prompt"][0]["content"] in said for row in rows])
    assert card["splits"]["train"]["sft_overlap"] == pytest.approx(shared)
    assert 0 < shared < 1
    child = open_directory(sft)
    child.record.update(stage="dpo", parents={"model_name_or_path": child.lineage})
    assert sft_prompts(child)[1] == str(data)
    data.write_text(data.read_text() * 2)
    assert sft_prompts(child) == (None, f"not known: {data} has changed since")


# ---------------------------------------------------------------- sampling


def sampler(folder: Path, **changes: Any) -> CandidateSampler:
    folder.mkdir(exist_ok=True)
    settings = SamplingSettings(max_new_tokens=12, batch_size=changes.pop("batch_size", 16), seed=1)
    keys: dict[str, Any] = {"labels": Labels([variety]), "num_generations": 4} | changes  # type: ignore[list-item]
    return CandidateSampler(model(), eval_models.tokenizer(), settings=settings, folder=folder, **keys)


def test_a_completion_depends_on_its_prompt_and_number_alone(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in WORDS]
    whole = sampler(tmp_path / "a").draw({"train": rows})["train"]
    assert len({text for one in whole for text in one.texts}) > 20
    fewer = sampler(tmp_path / "b", num_generations=2, batch_size=5).draw({"train": rows[:7]})["train"]
    assert [one.texts for one in fewer] == [one.texts[:2] for one in whole[:7]]
    other = sampler(tmp_path / "c").draw({"test": rows})["test"]
    assert [one.texts for one in other] != [one.texts for one in whole]


def test_scores_are_a_weighted_sum_and_nan_stays_nan() -> None:
    def first(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        assert columns["ended"] == [True, False, True, True]
        assert columns["n"] == [7, 7, 8, 8]
        return [1.0, 2.0, 3.0, math.nan]

    def second(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [float(prompt == "q") for prompt in prompts]

    labels = Labels([first, second], [2.0, 10.0])  # type: ignore[list-item]
    columns = {"ended": [[True, False], [True, True]], "n": [7, 8]}
    scores = labels(["p", "q"], [["a", "b"], ["c", "d"]], columns)
    assert scores[0] == [2.0, 4.0]
    assert scores[1][0] == 16.0
    assert math.isnan(scores[1][1])
    drawn = Candidates(["c", "d"], [1, 1], [True, True], scores[1])
    assert drawn.usable() == [0]


class Referee(JudgeScorer):
    """A judge without an endpoint: the longer reply is better; of two with an x it says nothing."""

    def compare(self, prompts: Any, ours: Any, theirs: Any) -> list[float]:
        pairs = zip(map(plain, ours), map(plain, theirs), strict=True)
        return [
            math.nan if "x" in one + other else (np.sign(len(one) - len(other)) + 1) / 2
            for one, other in pairs
        ]


def test_a_judges_score_is_the_share_of_duels_won() -> None:
    judge = Referee("http://localhost:1/v1", "m")
    scores = duels(judge, ["p", "q"], [["a", "bbb", "cc"], ["a", "b", "x"]])
    assert scores[0].tolist() == [0.0, 1.0, 0.5]
    assert scores[1].tolist()[:2] == [0.5, 0.5]
    assert math.isnan(scores[1][2])


# ---------------------------------------------------------------- going on


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes the chunks that are drawn."""
    noted: list[str] = []
    usual = CandidateSampler._draw_chunk

    def noting(self: Any, split: str, rows: Any, number: int) -> Any:
        if "cut" in noted and len(noted) == 4:
            raise RuntimeError("power cut")
        noted.append(f"{split} {number}")
        return usual(self, split, rows, number)

    monkeypatch.setattr(CandidateSampler, "_draw_chunk", noting)
    return noted


def test_a_run_that_died_goes_on_to_the_same_bits(recipe: Any, drawn: list[str]) -> None:
    keys = {"pairing": "random", "label_flip": 0.2}
    whole = run(recipe("whole", **keys))
    chunks = drawn.copy()
    drawn[:] = ["cut"]
    with pytest.raises(RuntimeError, match="power cut"):
        run(recipe(**keys))
    assert drawn[1:] == chunks[:3]
    drawn.clear()
    assert identity(run(recipe(**keys))) == identity(whole)
    assert drawn == chunks[3:]


def test_other_settings_never_reuse_samples(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("trueup.recipes.run.Run.publish", lambda *a, **k: (_ for _ in ()).throw(RuntimeError()))
        with pytest.raises(RuntimeError):
            run(recipe())
    warm = run(recipe(temperature=0.5))
    assert identity(warm) == identity(run(recipe("fresh", temperature=0.5)))


def test_asked_to_stop_it_finishes_its_chunk(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = CandidateSampler._draw_chunk

    def stopping(self: Any, split: str, rows: Any, number: int) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, split, rows, number)

    monkeypatch.setattr(CandidateSampler, "_draw_chunk", stopping)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 2 of"):
        run(recipe())


@pytest.mark.faults
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(recipe: Any) -> None:
    """kill -9 five times, each at a random moment after a further chunk was written."""
    start = (
        "import sys, trueup.preference.pairs_samples as s; s.CHUNK_BATCHES = 1; "
        "from trueup.app.cli import main; main(['pairs', '--config', sys.argv[1]])"
    )
    keys = {"max_completion_length": 60, "generation_batch_size": 4}
    whole, broken = run(recipe("whole", **keys)), recipe("broken", **keys)
    command = [sys.executable, "-c", start, str(broken.source)]
    samples = Path(f"{broken.values['output_dir']}.work") / "samples"
    moments = random.Random(0)
    for _ in range(5):
        before = len(list(samples.glob("*.json")))
        child = subprocess.Popen(command, start_new_session=True, cwd=Path(__file__).parent)
        while child.poll() is None and len(list(samples.glob("*.json"))) <= before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        assert child.poll() is None, "it ended before it could be killed"
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    subprocess.run(command, check=True, cwd=Path(__file__).parent)
    assert identity(Path(broken.values["output_dir"])) == identity(whole)


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_generations": 1}, "num_generations is 1, and a pair needs two completions"),
        ({"pairs_per_prompt": 3}, "pairs_per_prompt best_worst makes 2 pairs of 4 completions"),
        ({"temperature": 0.0}, "temperature 0 samples the same completion every time"),
        ({"pairing": "margin"}, "min_margin must be above 0 with pairing: margin"),
        ({"min_margin": 0.2}, "min_margin is read with pairing: margin"),
        ({"min_score": 0.5}, "min_score is read with output_form: prompt_completion"),
        ({"output_form": "prompt_completion", "label_flip": 0.1}, "label_flip is for pairs"),
        ({"label_flip": 0.6}, "label_flip must lie between 0 and 0.5"),
        ({"label_temperature": 0.0}, "label_temperature must be above 0"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 weights for 1 rewards"),
        ({"reward_funcs": "unset"}, "reward_funcs"),
        ({"reward_funcs": []}, "reward_funcs names no scorer"),
        ({"reward_funcs": ["judge"]}, "judge_kwargs must name the judge's base_url and model"),
        ({"judge_kwargs": {"model": "m"}}, "judge_kwargs is read with judge among reward_funcs"),
        ({"prompts_per_split": {"trian": 5}}, "prompts_per_split names splits: train, validation, test"),
        ({"prompts_per_split": {"train": 0}}, "prompts_per_split takes whole numbers above 0"),
        ({"dataset_streaming": True}, "dataset_streaming draws no prompts at random"),
        ({"pairing": "worst_best"}, "takes one of best_worst, random, margin"),
    ],
)
def test_a_recipe_that_cannot_be_meant(recipe: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**keys)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward_funcs": ["test_pairs:constant"]}, "no row is left: .* were ties, 0 below min_margin; a sc"),
        ({"reward_funcs": ["test_pairs:speechless"]}, r"no row is left: .* \d\d without a score \(nan\)"),
        ({"pairing": "margin", "min_margin": 5.0}, r"[1-9]\d* below min_margin"),
        ({"output_form": "prompt_completion", "min_score": 99.0}, "no row is left: .*lower min_score"),
        ({"max_completion_length": 120}, "no prompt leaves room for 120 tokens in the model's context of"),
        ({"reward_funcs": ["gold"]}, "gold: column .* is missing"),
        ({"reward_funcs": ["test_pairs:nothing"]}, "test_pairs:nothing: cannot be imported"),
        (
            {"reward_funcs": ["judge"],
             "judge_kwargs": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}},
            "127.0.0.1:9/v1/chat/completions: cannot be reached after 1 tries",
        ),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(recipe: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(TrueupError, match=message):
        run(recipe(prompts_per_split={"train": 12}, **keys))


def test_data_is_no_model_to_sample_from(recipe: Any) -> None:
    path = run(recipe("first", prompts_per_split={"train": 12}))
    with pytest.raises(
        UsageError, match=r"model_name_or_path: .*first: is a data set, and this needs a lang"
    ):
        open_run(recipe(model_name_or_path=str(path)))
    # Its prompts can be sampled from again, and are then a parent; its own columns do not come along.
    again = run(recipe(dataset_name=str(path), prompts_per_split={"train": None}, test_split_size=0.0,
                       validation_split_size=0.0))  # fmt: skip
    assert open_directory(again).record["parents"]["dataset_name"]["identity"] == identity(path)
    assert "p_label" not in (again / "train.jsonl").read_text()
