"""The recipe reader: what it accepts, what it refuses, and in which words."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ToyRecipe

from trueup.recipes.errors import UsageError
from trueup.recipes.machine import machine_defaults
from trueup.recipes.reader import Entry, RecipeError, parse_flags, read_recipe, render
from trueup.recipes.schema import BadValue, Key, fit, schema_of

pytestmark = pytest.mark.usefixtures("toy_stage")


def test_values_are_yaml_1_2_with_their_origin(write_recipe: Any) -> None:
    path = write_recipe(
        "stage: toy\noutput_dir: runs/toy\nlearning_rate: 1e-4\nmax_steps: 8e3\nloss_type: hinge\n"
    )
    recipe = read_recipe(path)
    assert recipe.values["learning_rate"] == 1e-4
    assert recipe.values["max_steps"] == 8000
    assert recipe.values["loss_type"] == ["hinge"]
    assert recipe.origin["learning_rate"] == f"{path}:3"
    assert recipe.origin["seed"] == "default"


def test_a_flag_wins_over_a_budget_and_that_over_the_file(write_recipe: Any) -> None:
    path = write_recipe(
        "stage: toy\noutput_dir: runs/lab/toy\nmodel_name_or_path: runs/lab/base\nmax_steps: 100\nseed: 1\n"
        "budgets:\n  smoke: {max_steps: 5, seed: 2}\n"
    )
    assert read_recipe(path).values["max_steps"] == 100
    recipe = read_recipe(path, budget="smoke", flags=parse_flags(["--seed", "3"], schema_of(ToyRecipe)))
    assert (recipe.values["max_steps"], recipe.values["seed"]) == (5, 3)
    assert recipe.values["output_dir"] == "runs/lab.smoke/toy"
    assert recipe.values["model_name_or_path"] == "runs/lab.smoke/base"
    assert recipe.origin["seed"] == "--seed"


def test_all_mistakes_are_reported_at_once_with_their_lines(write_recipe: Any) -> None:
    path = write_recipe(
        "stage: toy\noutput_dir: o/x\nlerning_rate: 1\nmax_steps: many\npacking: no\nseed: 1\nseed: 2\n"
        "optim: sgd\nloss_type: {a: 1}\nbudgets:\n  smoke:\n    max_stepz: 1\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    lines = caught.value.problems
    expected = {
        3: "unknown key lerning_rate; did you mean learning_rate?",
        4: "max_steps takes a whole number, not the text 'many'",
        5: "packing takes true or false, not the text 'no' (YAML 1.2 has only true and false)",
        7: f"seed stands twice (first at {path}:6)",
        8: "optim takes one of adamw, muon, not the text 'sgd'",
        9: "loss_type takes a list, not the mapping {'a': 1}",
        12: "unknown key max_stepz; did you mean max_steps?",
    }
    assert sorted(lines) == sorted(f"{path}:{line}: {text}" for line, text in expected.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"- a\n- b\n", ":1: a recipe is `key: value` lines"),
        (b"stage: toy\n\tseed: 1\n", ":2: not valid YAML: a tab begins the line"),
        (b"stage: toy\noutput_dir: a: b\n", ":2: not valid YAML: a second ':' on the line"),
        (b"stage: toy\nseed: [1, 2\n", "not valid YAML"),
        (b"stage: toy\nrun: 'caf\xe9'\n", ":2: not UTF-8 text (byte 0xe9)"),
        (b"output_dir: x\n", "names no stage"),
        (b"stage: tuy\n", ":1: there is no stage the text 'tuy'; did you mean toy?"),
        (b"stage: toy\ndataset_kwargs: {a: 1, a: 2}\n", "found duplicate key"),
        (b"stage: toy\nbudgets: {smoke: 3}\n", ":2: a budget is a mapping"),
        (b"stage: toy\nseed: !!python/object:os.system x\n", ":2: not valid YAML"),
        (b"stage: toy\n", "output_dir is missing: Where the model is written."),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_bom_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfstage: toy\noutput_dir: o/x\n")
    assert read_recipe(path).stage == "toy"


def test_a_missing_file_names_the_nearest(write_recipe: Any, tmp_path: Path) -> None:
    write_recipe("stage: toy\noutput_dir: x\n", "dpo.yaml")
    with pytest.raises(UsageError, match=r"no such recipe; did you mean .*dpo\.yaml"):
        read_recipe(tmp_path / "dpo.yml")
    with pytest.raises(UsageError, match="is a folder"):
        read_recipe(tmp_path)


def test_the_verb_and_the_file_must_agree(write_recipe: Any) -> None:
    path = write_recipe("stage: toy\noutput_dir: x\n")
    with pytest.raises(RecipeError, match="is for `trueup toy`, not `trueup pretrain`"):
        read_recipe(path, stage="pretrain")
    assert read_recipe(write_recipe("output_dir: x\n"), stage="toy").stage == "toy"


def test_contradictions_name_the_line(write_recipe: Any) -> None:
    path = write_recipe("stage: toy\noutput_dir: x\nloss_weights: [1, 2]\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: loss_weights needs one weight per loss_type"):
        read_recipe(path)


# ---------------------------------------------------------------- retired keys


def test_retired_keys_are_translated_aloud(write_recipe: Any) -> None:
    recipe = read_recipe(
        write_recipe(
            "stage: toy\noutput_dir: x\nwarmup_ratio: 0.1\noverwrite_output_dir: true\nrpo_alpha: 0.5\n"
        )
    )
    assert recipe.values["warmup_steps"] == 0.1
    assert recipe.values["loss_type"] == ["sigmoid", "sft"]
    assert recipe.values["loss_weights"] == [1.0, 0.5]
    assert [note.split(": ", 1)[1].split(" is retired")[0] for note in recipe.notes] == [
        "warmup_ratio",
        "overwrite_output_dir",
        "rpo_alpha",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_prompt_length: 128", "max_prompt_length is retired: TRL limits prompt and completion together"),
        ("torch_dtype: bfloat16", "torch_dtype is retired: now called dtype, which this stage does not have"),
        ("warmup_ratio: 5", "warmup_ratio is retired: takes a share in [0, 1), not 5"),
        ("warmup_ratio: 0.1\nwarmup_steps: 10", "warmup_ratio is retired: warmup_steps is given too"),
        ("rpo_alpha: 1.0\nloss_type: [ipo]", "rpo_alpha is retired: today: loss_type: [sigmoid, sft]"),
        ("dataset_mixer: 3", "dataset_mixer is retired: takes a mapping of data set to share"),
    ],
)
def test_retired_keys_that_cannot_be_translated_are_refused(
    write_recipe: Any, line: str, message: str
) -> None:
    path = write_recipe(f"stage: toy\noutput_dir: x\n{line}\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert f"{path}:3: {message}" in str(caught.value)


def test_a_handbook_recipe_reads_on_trl_s_own_configs(
    write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of an alignment-handbook SFT recipe, on a schema made of TRL's classes."""
    from trueup.recipes.stages import STAGES

    monkeypatch.setitem(STAGES, "sft", ("trl_schema:TrlRecipe", "TRL."))
    recipe = read_recipe(
        write_recipe(
            """
            model_name_or_path: some/model
            torch_dtype: bfloat16
            attn_implementation: sdpa
            dataset_mixture:
              datasets:
                - {id: org/set, config: all, split: train_sft, columns: [messages], weight: 1.0}
              seed: 0
            bf16: true
            do_eval: true
            eval_strategy: "no"
            gradient_accumulation_steps: 4
            gradient_checkpointing: true
            gradient_checkpointing_kwargs:
              use_reentrant: false
            learning_rate: 2.0e-05
            lr_scheduler_type: cosine
            log_level: info
            max_seq_length: 2048
            num_train_epochs: 1
            output_dir: data/zephyr
            overwrite_output_dir: true
            report_to:
            - tensorboard
            lora_target_modules: [q_proj, v_proj]
            use_peft: true
            warmup_ratio: 0.1
            """
        ),
        stage="sft",
    )
    assert recipe.values["dtype"] == "bfloat16"
    assert recipe.values["max_length"] == 2048
    assert recipe.values["warmup_steps"] == 0.1
    assert recipe.values["datasets"] == [
        {"path": "org/set", "name": "all", "split": "train_sft", "columns": ["messages"], "weight": 1.0}
    ]
    assert len(recipe.notes) == 5
    with pytest.raises(RecipeError, match="lr_scheduler_type takes one of linear, cosine"):
        read_recipe(
            None, stage="sft", flags=[Entry("output_dir", "x", "f"), Entry("lr_scheduler_type", "cosin", "f")]
        )


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, 3, 3.0),
        (int, 3.0, 3),
        (float | None, None, None),
        (str | list[str], ["a"], ["a"]),
        (float | int, 3, 3),
        (list[float] | None, 2, [2.0]),
        (dict | str | None, {"a": 1}, {"a": 1}),
        (bool | None, True, True),
    ],
)
def test_values_that_fit(hint: Any, value: Any, expected: Any) -> None:
    got = fit(value, Key("k", hint, None, ""))
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (float, "1e-4x"),
        (int, 3.5),
        (int, True),
        (bool, 1),
        (str, 3),
        (str, False),
        (list[int], ["a"]),
        (dict, [1]),
        (int, None),
    ],
)
def test_values_that_do_not_fit(hint: Any, value: Any) -> None:
    with pytest.raises(BadValue):
        fit(value, Key("k", hint, 1, ""))


def test_flags(tmp_path: Path) -> None:
    schema = schema_of(ToyRecipe)
    words = [
        "--learning-rate",
        "1e-4",
        "--packing",
        "--loss_type",
        "sigmoid",
        "sft",
        "--output_dir=2024",
        "--seed=-1",
    ]
    entries = {entry.key: entry.value for entry in parse_flags(words, schema)}
    assert entries == {
        "learning_rate": 1e-4,
        "packing": True,
        "loss_type": ["sigmoid", "sft"],
        "output_dir": "2024",
        "seed": -1,
    }
    with pytest.raises(UsageError, match="'oops' is not a flag"):
        parse_flags(["oops"], schema)
    with pytest.raises(RecipeError, match=r"--sed: unknown key sed; did you mean seed\?"):
        read_recipe(None, stage="toy", flags=parse_flags(["--output_dir", "x", "--sed", "1"], schema))


def test_the_resolved_recipe_reads_back_and_hides_tokens(write_recipe: Any) -> None:
    path = write_recipe(
        "stage: toy\noutput_dir: o/x\nlearning_rate: 1e-5\nhub_token: hf_secret\n"
        "dataset_kwargs: {flip: 0.1}\n"
    )
    recipe = read_recipe(path)
    shown = render(recipe)
    assert "hf_secret" not in shown
    again = read_recipe(write_recipe(shown, "again.yaml"))
    assert {**again.values, "hub_token": None} == {**recipe.values, "hub_token": None}


# ---------------------------------------------------------------- machine


def _keys(*names: str) -> dict[str, Key]:
    return {name: Key(name, Any, None, "") for name in names}


def test_machine_defaults_never_touch_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trueup.recipes.machine.accelerator", lambda: "cpu")
    monkeypatch.setattr("trueup.recipes.machine.has_bf16", lambda device: device != "mps")
    keys = _keys("use_cpu", "bf16", "fp16")
    assert {k: v for k, (v, _) in machine_defaults(keys, {}).items()} == {
        "use_cpu": True,
        "bf16": True,
        "fp16": False,
    }
    assert "bf16" not in machine_defaults(keys, {"bf16": False})
    assert machine_defaults(keys, {"fp16": True})["bf16"][0] is False
    assert machine_defaults(_keys("learning_rate"), {}) == {}


def test_a_gpu_without_bf16_takes_fp16_unless_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trueup.recipes.machine.accelerator", lambda: "cuda")
    monkeypatch.setattr("trueup.recipes.machine.has_bf16", lambda device: False)
    keys = _keys("use_cpu", "bf16", "fp16")
    assert {k: v for k, (v, _) in machine_defaults(keys, {}).items()} == {
        "use_cpu": False,
        "bf16": False,
        "fp16": True,
    }
    assert machine_defaults(keys, {"bf16": False})["fp16"][0] is False
    assert machine_defaults(keys, {"use_cpu": True})["fp16"][0] is False
