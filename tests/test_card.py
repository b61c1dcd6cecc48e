"""Cards: what they claim stands in a file, their metadata is the Hub's, their lines of code run, and nothing
that a model or a user wrote can change the page."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval_models
import pytest
from compare_models import World, verdict, write_model
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.repocard import metadata_load
from markdown_it import MarkdownIt

from trueup.app.card import Card, card, save
from trueup.app.card_public import public
from trueup.app.cli import main
from trueup.eval.markdown import block, code, escape, quote
from trueup.recipes.directory import RECORD, identity, read_json, write_json
from trueup.recipes.errors import UsageError
from trueup.recipes.reader import read_recipe
from trueup.recipes.run import open_run, versions

HOSTILE = (
    "<script>alert(1)</script> | `x` [a](javascript:1) ![p](http://t/x.png) **b** $$x$$ {{ 7 * 7 }}"
    "\n# head\n---"
)


def made(stage: str, **more: Any) -> dict[str, Any]:
    """What a run records besides its parents."""
    return {
        "recipe": {"output_dir": f"runs/{stage}", "use_cpu": True, "seed": 7, "learning_rate": 0.001},
        "origin": {"output_dir": "dpo.yaml:1", "use_cpu": "this machine: no GPU found"},
        "data": [{"name": "lab/chat", "split": "train", "sha256": "ab" * 32}],
        "seeds": {"seed": 7},
        "metrics": {"eval_loss": 1.2345678, "eval_kl": 2.5, "eval_kl_stderr": 0.25},
        "tokens": 12345,
        "started": "2026-11-21T10:00:00Z",
        "seconds": 75.0,
        "versions": versions(),
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An SFT model, two arms, a reward model, and a comparison of them beside them."""
    found = World(tmp_path_factory.mktemp("runs"))
    arms = {"dpo": found.dpo(**made("dpo")), "ppo": found.ppo(**made("ppo", data=found.read))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trueup.eval.compare.write_report", draw_nothing)
        keys = {"reward_model_name_or_path": str(found.reward), "best_of": [2], "allow_unequal": True}
        shutil.copytree(found.compare(arms, **keys), found.folder / "compare")
    return found


def draw_nothing(folder: Path) -> None:
    """In place of the report, whose plots take seconds."""
    for name in ("report.html", "win_rates.png", "frontier.png"):
        (folder / name).write_bytes(b"a picture")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("pretrained") / "base", "pretrain", seed=22, **made("pretrain")
    )


def loaded(made_card: Card, folder: Path, kind: Any = ModelCard) -> Any:
    """The card as huggingface_hub reads it back from a repository's folder."""
    save(made_card, folder)
    assert metadata_load(folder / "README.md")
    return kind.load(folder / "README.md")


def html(text: str) -> str:
    """The page as the Hub would make it, before it is cleaned."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("\n---\n", 1)[1]))


def python(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.S)
    assert found
    return found[1]


# --------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    ("name", "tags", "task"),
    [
        ("sft", ["trueup", "sft", "trl"], "text-generation"),
        ("dpo", ["trueup", "dpo", "trl"], "text-generation"),
        ("ppo", ["trueup", "ppo"], "text-generation"),
        ("reward", ["trueup", "reward-model", "trl"], "text-classification"),
    ],
)
def test_metadata_is_what_the_hub_sorts_by(
    world: World, tmp_path: Path, name: str, tags: list[str], task: str
) -> None:
    head = loaded(card(world.folder / name, "someone/it", license="apache-2.0"), tmp_path).data
    assert (head.library_name, head.pipeline_tag, head.license) == ("transformers", task, "apache-2.0")
    assert head.tags == tags
    assert head.base_model is None, "a directory of this disk is no id of the Hub"
    assert head.datasets is None


def test_the_model_index_holds_every_result_once_and_reads_back(world: World, tmp_path: Path) -> None:
    model = copied(world.folder / "dpo", tmp_path / "dpo")
    shutil.copytree(world.folder / "compare", tmp_path / "compare")
    write_report(model)
    data = loaded(card(model, "someone/it"), tmp_path / "card").data
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results}
    assert found["arc", "acc"] == 0.25
    assert found["arc", "acc_stderr"] == 0.02
    pair = next(p for p in verdict(tmp_path / "compare")["pairs"] if {p["a"], p["b"]} == {"dpo", "baseline"})
    rates = [
        one
        for one in data.eval_results
        if one.metric_type == "win_rate" and "over baseline" in one.metric_name
    ]
    assert [one.metric_value for one in rates] == [pair["rate"]["estimate"]]
    assert f"{pair['rate']['low']:.4f}" in rates[0].metric_name
    again = ModelCard(str(ModelCard.load(tmp_path / "card" / "README.md"))).data.eval_results
    assert again == data.eval_results


def test_a_model_that_began_on_the_hub_names_it(world: World, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    write_model(snapshot, "pretrain", seed=5)
    sft = write_model(tmp_path / "sft", "sft", seed=6, parents={"model_name_or_path": snapshot})
    data = [{"name": "org/pairs", "split": "train", "sha256": "0", "revision": "abc"}]
    dpo = write_model(tmp_path / "dpo", "dpo", seed=7, parents={"model_name_or_path": sft}, data=data)
    made_card = card(dpo)
    head = loaded(made_card, tmp_path / "card").data
    assert (head.base_model, head.base_model_relation) == ("Qwen/Qwen3-0.6B", "finetune")
    assert head.datasets == ["org/pairs"]
    assert str(tmp_path) not in made_card.text


def test_without_a_licence_it_has_none_and_says_so(base: Path, tmp_path: Path) -> None:
    found = card(base)
    assert "license" not in metadata_of(found, tmp_path)
    assert "Licence: none was given" in found.text
    with pytest.raises(UsageError, match="not an identifier of the Hub's"):
        card(base, license="All rights reserved")


def metadata_of(made_card: Card, folder: Path) -> dict[str, Any]:
    save(made_card, folder)
    return dict(metadata_load(folder / "README.md") or {})


# ----------------------------------------------------------------------------------- figures from their files


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def write_report(model: Path, **changes: Any) -> None:
    """What `trueup eval` leaves."""
    report = {
        "task": "arc", "variant": ["5-shot"], "identity": identity(model),
        "results": {"arc": {"acc,none": 0.25, "acc_stderr,none": 0.02, "alias": "arc"}},
        "higher_is_better": {"arc": {"acc": True}}, "n-samples": {"arc": {"effective": 321}},
        "n-shot": {"arc": 5}, "chance": {"arc": 0.125},
        "settings": {"apply_chat_template": True, "limit": None},
    }  # fmt: skip
    (model / "eval").mkdir(exist_ok=True)
    write_json(model / "eval" / "arc.5-shot.json", report | changes)


def test_the_verdict_is_the_comparison_s_own_words_with_intervals(world: World) -> None:
    found = card(world.folder / "dpo")
    about = [pair for pair in verdict(world.folder / "compare")["pairs"] if "dpo" in (pair["a"], pair["b"])]
    assert len(about) == 3
    for pair in about:
        assert str(escape(pair["text"])) in found.text
        rate = pair["rate"]
        assert f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]" in found.text
    assert found.files["card/frontier.png"] == world.folder / "compare" / "frontier.png"
    assert found.files["card/win_rates.png"] == world.folder / "compare" / "win_rates.png"
    for name in found.files:
        assert f"]({name})" in found.text


def test_a_reward_model_s_card_tells_of_the_answers_that_it_chose(world: World) -> None:
    text = card(world.folder / "reward").text
    assert "chose the answers of best-of-2" in text
    assert "dpo beats" not in text
    assert "Not measured: the exam of the reward model" in text


def test_the_newest_comparison_with_the_model_is_taken_or_the_one_named(
    world: World, base: Path, tmp_path: Path
) -> None:
    model = copied(world.folder / "dpo", tmp_path / "dpo")
    for name, day in (("old", 1), ("new", 2)):
        folder = copied(world.folder / "compare", tmp_path / name)
        write_json(folder / RECORD, read_json(folder / RECORD) | {"started": f"2026-01-0{day}"})
    shutil.copytree(tmp_path / "new", tmp_path / "newest.previous")
    assert "`new/verdict.json`" in card(model).text
    assert "`old/verdict.json`" in card(model, comparison=tmp_path / "old").text
    assert "verdict.json" not in card(base).text
    with pytest.raises(UsageError, match="is none of its arms"):
        card(base, comparison=tmp_path / "old")
    with pytest.raises(UsageError, match="not a comparison"):
        card(base, comparison=base)
    with pytest.raises(UsageError, match="name a model, and this with --comparison"):
        card(tmp_path / "old")


def test_lm_eval_s_figures_come_with_all_that_swings_them(base: Path, tmp_path: Path) -> None:
    model = copied(base, tmp_path / "base")
    write_report(model)
    row = next(line for line in card(model).text.splitlines() if line.startswith("| `arc`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["`arc`", "acc ↑", "0.25", "± 0.039", "0.125", "321", "5", "on"]
    assert "By lm-eval (`eval/arc.5-shot.json`)" in card(model).text
    assert "Not measured: any task of lm-eval" not in card(model).text
    found = {"acc,none": 0.0, "acc_stderr,none": 0.0}
    write_report(model, results={"arc": found})
    assert "| all alike |" in card(model).text, "an error of 0 is none that anybody knows"
    write_report(model, identity="another")
    text = card(model).text
    assert "0.25" not in text
    assert "was measured on another model" in text
    assert "Not measured: any task of lm-eval" in text


def test_the_last_figures_of_the_run_with_their_reach(world: World) -> None:
    text = card(world.folder / "dpo").text
    assert "| loss on the validation split | 1.2346 | not known |" in text
    assert "| KL from the model it began as, nats per answer | 2.5 | ± 0.49 |" in text


def test_a_run_in_no_comparison_shows_its_own_frontier(world: World, tmp_path: Path) -> None:
    model = copied(world.folder / "ppo", tmp_path / "ppo")
    assert "card/frontier.png" not in card(model).files
    lines = [{"step": n, "split": "validation", "kl": n / 2, "score": 1.0, "reward": 2.0} for n in range(3)]
    (model / "frontier.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = card(model)
    assert bytes(found.files["card/frontier.png"]).startswith(b"\x89PNG")
    assert "](card/frontier.png)" in found.text
    assert "large marks" not in found.text


def test_the_exam_of_a_reward_model(world: World, tmp_path: Path) -> None:
    from trueup.eval.exam import examine
    from trueup.eval.scorers import RewardModelScorer

    model = copied(world.reward, tmp_path / "reward")
    rows = [{"prompt": f"q{n}", "chosen": "a b c" * (1 + n % 3), "rejected": f"no {n}"} for n in range(12)]
    report = examine(RewardModelScorer.open(model), rows)
    report |= {
        "identity": identity(model),
        "data": {"name": "lab/preferences", "split": "test", "sha256": "cd" * 32},
    }
    report["must_matter"]["refusal instead"]["fell"] |= {"estimate": 0.25}
    (model / "eval").mkdir()
    write_json(model / "eval" / "exam.json", report)
    text = card(model).text
    right = report["accuracy"]
    assert f"| {right['estimate']:.1%}".replace("%", " %") in text
    assert f"[{100 * right['low']:.1f}, {100 * right['high']:.1f}]" in text
    assert f"{100 * report['reliability']['ece']:.1f} %" in text
    assert "refusal instead (its score falls in 25%)" in text.partition("## Limits")[2]
    head = loaded(card(model), tmp_path / "card").data
    assert [one.metric_value for one in head.eval_results if one.metric_type == "accuracy"] == [
        right["estimate"]
    ]
    write_json(model / "eval" / "exam.json", report | {"identity": "of other weights"})
    assert "## Exam" not in card(model).text


# ------------------------------------------------------------------------------------------- where it is from


def test_lineage_time_and_tokens_of_all_that_is_still_there(world: World, tmp_path: Path) -> None:
    found = card(world.folder / "ppo")
    assert isinstance(found.files["card/lineage.png"], bytes)
    assert found.files["card/lineage.png"] == card(world.folder / "ppo").files["card/lineage.png"]
    lines = found.text.partition("## Where it comes from")[2].splitlines()
    rows = [line for line in lines if re.match(r"\| \**(sft|pairs|reward|ppo)", line)]
    assert [re.sub(r"\W", "", line.split("|")[1]) for line in rows] == ["sft", "pairs", "reward", "ppo"]
    assert "begins as: sft, reward: reward" in rows[3]
    assert "| 1 min 15 s | 12,345 | CPU" in rows[3]
    assert "not at hand" in rows[0], "its record holds no time"
    assert "of the 1 of 4 whose records are at hand" in found.text
    alone = copied(world.folder / "ppo", tmp_path / "ppo")
    write_json(alone / RECORD, json.loads((alone / RECORD).read_text().replace(str(world.folder), "/gone")))
    text = card(alone).text
    assert "begins as: sft" in text
    assert "/gone" not in text


def test_the_recipe_on_the_card_makes_the_same_model(tmp_path: Path) -> None:
    """A real LoRA DPO: the recipe runs as it stands there, and decides the same result."""
    from offline_models import recipe_maker, run, write_start

    start = write_start(tmp_path / "start")
    lora = {"use_peft": True, "lora_r": 2, "max_steps": 1, "save_steps": 1, "eval_strategy": "no",
            **dict.fromkeys(("scorers", "max_new_tokens", "max_eval_prompts"), "unset")}  # fmt: skip
    recipe = recipe_maker(tmp_path, start, "dpo")(eval_steps="unset", validation_split_size=0.0, **lora)
    path = run(recipe)
    found = card(path, "someone/it")
    text = re.search(r"```yaml\n(.*?)```", found.text, re.S)
    assert text
    (tmp_path / "again.yaml").write_text(text[1].replace('"start"', f'"{start}"').replace(
        '"pairs.jsonl"', f'"{tmp_path}/pairs.jsonl"'))  # fmt: skip
    again, _ = open_run(read_recipe(tmp_path / "again.yaml"))
    assert again.inputs == read_json(path / RECORD)["inputs"]
    assert "lora" in loaded(found, tmp_path / "card").data.tags
    assert 'subfolder="adapter"' in found.text
    adapter = card(path / "adapter", "someone/adapter")
    head = loaded(adapter, tmp_path / "adapter-card").data
    assert head.library_name == "peft"
    assert "A LoRA adapter: a chat model when put on `start`" in adapter.text
    lines = python(adapter.text).replace('"someone/adapter"', repr(str(path / "adapter")))
    found_model = executed(lines.replace('"start"', repr(str(start))))["model"]
    assert found_model.active_adapters == ["default"]


# ----------------------------------------------------------------------------------------- lines that load it


def executed(lines: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(lines, "card", "exec"), names)
    return names


def test_the_lines_that_load_a_chat_model(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    lines = python(card(world.folder / "sft", "someone/it").text)
    assert len(lines.splitlines()) == 3
    found = executed(lines.replace('"someone/it"', repr(str(world.folder / "sft"))))
    assert found["generate"].model.config.model_type == "trueup_gpt"
    assert "trust_remote_code=True" in lines
    assert "role" in lines


def test_the_lines_that_load_a_base_model_give_it_a_text_to_go_on_with(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = card(base, "someone/it").text
    assert "goes on with a text" in text
    executed(python(text).replace('"someone/it"', repr(str(base))))
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_the_lines_that_load_a_reward_model_score_an_answer(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = python(card(world.reward, "someone/it").text)
    found = executed(lines.replace('"someone/it"', repr(str(world.reward))))
    assert float(capsys.readouterr().out) == pytest.approx(
        found["model"](**found["tokens"]).logits[0, 0].item()
    )


def test_a_form_of_transformers_own_needs_no_remote_code(tmp_path: Path) -> None:
    model = tmp_path / "llama"
    eval_models.policy("llama").save_pretrained(model)
    eval_models.tokenizer().save_pretrained(model)
    text = card(model, "someone/it").text
    assert "remote" not in text
    assert "How it was made is not recorded" in text
    executed(python(text).replace('"someone/it"', repr(str(model))))


# ---------------------------------------------------------------------------------------------- hostile words


@pytest.mark.parametrize(
    "render", [escape, code, quote, block, lambda value: f"| {escape(value)} | {code(value)} |"]
)
def test_nothing_that_was_written_changes_the_page(render: Callable[[str], str]) -> None:
    page = f"# Title\n\n| a | b |\n|---|---|\n{render(HOSTILE)}\n\n{render(HOSTILE)}\n"
    found = html(f"\n---\n{page}")
    assert "<script" not in found
    assert "<img" not in found
    assert "<a " not in found
    assert "<strong>" not in found
    assert found.count("<h1>") == 1
    assert "<h2>" not in found
    assert "<hr" not in found


def test_the_words_themselves_survive() -> None:
    for text in (
        "3.5 of [1.2, 3.4]",
        "snake_case -1.5 & <b>",
        r"a\b|c *d* `e` _f_ ~g~ $h$",
        "1. no list",
        "# no head",
    ):
        shown = html(f"\n---\n{escape(text)}")
        plain = re.sub(r"</?p>|\n", "", shown).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        assert plain == text
    assert str(block("a\n```\nb")).startswith("````")


def test_hostile_records_make_a_harmless_card(world: World, tmp_path: Path) -> None:
    parent = write_model(tmp_path / "$\\frac$ <b>`", "sft", seed=11)
    path = write_model(
        tmp_path / "dpo", "dpo", seed=12, parents={"model_name_or_path": parent},
        **made("dpo", data=[{"name": HOSTILE, "split": HOSTILE, "sha256": HOSTILE}], metrics={HOSTILE: 1.0},
               versions={"torch": HOSTILE}, recipe={"output_dir": HOSTILE, "use_cpu": "```\n# x"}),
    )  # fmt: skip
    found = card(path, "someone/it")
    page = html(found.text)
    assert "<script" not in page
    assert page.count("<h1>") == 1
    assert "<a " not in page
    assert set(re.findall(r'<img src="([^"]*)"', page)) == {"card/lineage.png"}
    assert "{{ 7 * 7 }}" in page
    assert loaded(found, tmp_path / "card").data.tags == ["trueup", "dpo", "trl"]


def test_no_path_of_this_machine_and_no_token(tmp_path: Path) -> None:
    folder = tmp_path / "my secret project"
    parent = write_model(folder / "sft", "sft", seed=13)
    recipe = {
        "output_dir": str(folder / "dpo"), "model_name_or_path": str(parent),
        "dataset_name": "/data/private/rows.jsonl", "hub_token": "hf_abcdefghijklmnopqrst",
        "judge_kwargs": {"api_key": "sk-abcdefghijklmnopqrst", "model": "m"},
        "run_name": f"see {folder}/notes and /etc/hosts, or https://huggingface.co/org/name",
    }  # fmt: skip
    more = made("dpo", recipe=recipe, origin=dict.fromkeys(recipe, "recipe.yaml:1"))
    path = write_model(folder / "dpo", "dpo", seed=14, parents={"model_name_or_path": parent}, **more)
    for text in (card(path).text, card(path, "someone/it").text):
        for private in (str(tmp_path), "secret project", "/data", "/etc", "hf_abc", "sk-abc"):
            assert private not in text
        assert "https://huggingface.co/org/name" in text
        assert 'model_name_or_path: "sft"' in text
        assert "max_new_tokens" in text
    assert public({"stop_token": "</s>", "max_new_tokens": 5}, folder) == {
        "stop_token": "</s>",
        "max_new_tokens": 5,
    }


# ------------------------------------------------------------------------------------------------------- data


def write_pairs(folder: Path, **sizes: int) -> Path:
    folder.mkdir()
    for split, count in sizes.items():
        rows = [
            {"prompt": f"p{n}", "chosen": HOSTILE, "rejected": "no", "p_label": 0.9} for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_data_set_s_card_makes_its_splits_loadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_pairs(tmp_path / "pairs", train=5, validation=2, test=3)
    before = identity(path)
    found = card(path, "someone/pairs", license="cc-by-4.0")
    head = loaded(found, path, DatasetCard).data
    assert identity(path) == before
    assert (head.license, head.size_categories, head.task_categories) == (
        "cc-by-4.0",
        "n<1K",
        ["text-generation"],
    )
    assert "10 preference pairs: 5 train, 2 validation, 3 test." in found.text
    rows = executed(python(found.text).replace('"someone/pairs"', repr(str(path))))["rows"]
    assert {split: len(rows[split]) for split in rows} == {"train": 5, "validation": 2, "test": 3}
    assert "`p_label` | number |" in found.text


def test_the_card_of_pairs_that_a_stage_made(tmp_path: Path) -> None:
    """How they were sampled and labelled, the noise, a few rows: from the stage's own card, and escaped."""
    path = write_pairs(tmp_path / "pairs", train=4)
    row = {"prompt": HOSTILE, "chosen": HOSTILE, "rejected": "no", "score_chosen": 1.0, "score_rejected": 0.5}
    figures = {"rows": 4, "labels_against_score": 0.125, "label_ceiling": 0.875}
    made_so = {"model": f"{tmp_path}/sft (abc)", "labels": "10% are then turned round"}
    write_json(
        path / "card.json",
        {"made": made_so, "splits": {"train": figures}, "sft_data": "lab/chat", "examples": [row]},
    )
    record = {"stage": "pairs", "identity": identity(path), "parents": {}}
    recipe = {"output_dir": "p", "label_flip": 0.1, "reward_funcs": ["gold"]}
    write_json(
        path / RECORD,
        record | made("pairs", recipe=recipe, origin={}),
    )
    text = card(path).text
    assert re.search(r"labels against score *\| *12.5%", text)
    assert re.search(r"label ceiling *\| *87.5%", text)
    assert "10% are then turned round" in text
    assert str(tmp_path) not in text
    assert "What is better was decided by gold" in text
    page = html(text)
    assert page.count("<h1>") == 1
    assert "<script" not in page
    assert "<blockquote>" in page


def test_a_file_of_rows_has_a_card_too(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "votes", train=3) / "train.jsonl"
    path = path.rename(tmp_path / "preferences.jsonl")
    found = card(path, "someone/votes")
    head = loaded(found, tmp_path / "card", DatasetCard).data
    assert head.configs[0]["data_files"] == [{"split": "train", "path": "preferences.jsonl"}]
    assert "How it was made is not recorded" in found.text
    path.write_text("")
    with pytest.raises(UsageError, match="holds no rows"):
        card(path)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_or_writes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["card", str(base), "--license", "mit"])
    assert "license: mit" in capsys.readouterr().out
    model = copied(base, tmp_path / "base")
    with pytest.raises(SystemExit, match="0"):
        main(["card", str(model), "--output", str(model)])
    assert (model / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    assert identity(model) == read_json(model / RECORD)["identity"]
    with pytest.raises(SystemExit, match="2"):
        main(["card", str(tmp_path / "nowhere")])
    assert "no such model directory" in capsys.readouterr().err
