"""`trueup eval`: scores against closed forms, reports, names of tasks, and the command itself."""

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import eval_models
import numpy as np
import pytest
import torch
from harness_models import QUESTIONS, TEXTS, nats, prose, quiz, write_task

from trueup.app import cli
from trueup.eval.compare_tax import bits_per_byte
from trueup.eval.harness import EvalSettings, evaluate, save_report
from trueup.eval.harness_tasks import OURS, LoadedTask, load_tasks
from trueup.eval.results import figures
from trueup.recipes.directory import identity
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.lab.datasets import rows
from trueup.recipes.lab.gold import TRUTH_COLUMNS, gold

Report = dict[str, Any]


def measured(path: Path | str, model: Any = None, **settings: Any) -> Report:
    [task] = load_tasks([str(path)])
    return evaluate(
        eval_models.policy() if model is None else model,
        eval_models.tokenizer(),
        task,
        EvalSettings(**settings),
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "policy"
    eval_models.policy().save_pretrained(path)
    eval_models.tokenizer().save_pretrained(path)
    return path


# ---------------------------------------------------------------------------------------------- the scores


def test_multiple_choice_is_what_one_computes_by_hand(tmp_path: Path) -> None:
    model, tokenizer = eval_models.policy(), eval_models.tokenizer()
    report = measured(quiz(tmp_path), model)
    right, right_by_length, likelihoods = [], [], []
    for row in QUESTIONS:
        context = tokenizer(row["question"])["input_ids"]
        scores = [
            nats(model, context, tokenizer(f" {choice}", add_special_tokens=False)["input_ids"])
            for choice in row["choices"]
        ]
        likelihoods += scores
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right.append(scores.index(max(scores)) == row["gold"])
        right_by_length.append(by_length.index(max(by_length)) == row["gold"])
    found = report["results"]["quiz"]
    assert found["acc,none"] == sum(right) / len(right)
    assert found["acc_norm,none"] == sum(right_by_length) / len(right)
    assert found["acc_stderr,none"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    asked = [answer[0][0] for row in report["samples"]["quiz"] for answer in row["resps"]]
    assert [float(value) for value in asked] == pytest.approx(likelihoods, abs=1e-3)
    assert report["chance"]["quiz"] == pytest.approx(sum(1 / len(row["choices"]) for row in QUESTIONS) / 5)


def test_bits_per_byte_and_perplexities_are_what_one_computes_by_hand(tmp_path: Path) -> None:
    model, tokenizer = eval_models.policy(), eval_models.tokenizer()
    found = measured(prose(tmp_path), model)["results"]["prose"]
    total = -sum(nats(model, ids[:1], ids[1:]) for ids in (tokenizer(text)["input_ids"] for text in TEXTS))
    size, words = sum(len(text.encode()) for text in TEXTS), sum(len(text.split()) for text in TEXTS)
    assert found["bits_per_byte,none"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(total / size), rel=1e-5)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(total / words), rel=1e-4)


def test_errors_of_ratios_are_those_of_the_bootstrap(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [
        " ".join(rng.choice(["a", "stone", "rain", "sea"]) for _ in range(rng.randint(2, 9)))
        for _ in range(60)
    ]
    report = measured(prose(tmp_path, texts=texts))
    found, samples = report["results"]["prose"], report["samples"]["prose"]
    pairs = np.array([row["bits_per_byte"] for row in samples])
    drawn = pairs[np.random.default_rng(0).integers(len(pairs), size=(2000, len(pairs)))].sum(axis=1)
    per_byte = (drawn[:, 0] / drawn[:, 1]).std()
    assert found["bits_per_byte_stderr,none"] == pytest.approx(per_byte / math.log(2), rel=0.15)
    relative = found["byte_perplexity_stderr,none"] / found["byte_perplexity,none"]
    assert relative == pytest.approx(per_byte, rel=0.15)  # what errs is the exponent


def test_batches_do_not_change_a_score(tmp_path: Path) -> None:
    path = quiz(tmp_path)
    one, other = (measured(path, batch_size=size) for size in (1, 16))
    assert one["results"] == other["results"]


def test_a_measurement_leaves_no_trace(tmp_path: Path) -> None:
    [task] = load_tasks([str(quiz(tmp_path))])
    model = eval_models.policy().train()
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    evaluate(model, eval_models.tokenizer(), task, EvalSettings(num_fewshot=1))
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert model.training


def test_worked_examples_and_chat_template_are_asked_with_and_recorded(tmp_path: Path) -> None:
    path = quiz(tmp_path)
    plain = measured(path)
    shown = measured(path, num_fewshot=2, apply_chat_template=True, system_instruction="Be brief.")
    asked = shown["samples"]["quiz"][0]["arguments"][0][0]
    assert asked.startswith("<|bos|><|system|>Be brief.<|end|><|user|>")
    assert asked.count("<|assistant|>") == 3
    assert asked.endswith(f"{QUESTIONS[0]['question']}<|end|><|assistant|>")
    assert plain["settings"]["apply_chat_template"] is False
    assert shown["settings"]["apply_chat_template"] is True
    assert (plain["n-shot"], shown["n-shot"]) == ({"quiz": 0}, {"quiz": 2})
    assert shown["variant"] == ["2-shot", "chat", "system"]
    [task] = load_tasks([str(path)])  # a task is not changed by how it was asked last
    model, tokenizer = eval_models.policy(), eval_models.tokenizer()
    shots = [evaluate(model, tokenizer, task, EvalSettings(num_fewshot=n))["n-shot"] for n in (None, 1, None)]
    assert shots == [{"quiz": 0}, {"quiz": 1}, {"quiz": 0}]


def test_a_group_is_scored_as_lm_eval_does(tmp_path: Path) -> None:
    quiz(tmp_path, "one")
    quiz(tmp_path, "two", QUESTIONS[:2])
    metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]
    group = tmp_path / "both.yaml"
    group.write_text(json.dumps({"group": "both", "task": ["one", "two"], "aggregate_metric_list": metrics}))
    report = measured(group)
    own = [report["results"][name] for name in ("one", "two")]
    whole = report["results"]["both"]
    assert whole["acc,none"] == pytest.approx((own[0]["acc,none"] + own[1]["acc,none"]) / 2)
    errors = [one["acc_stderr,none"] for one in own]
    assert whole["acc_stderr,none"] == pytest.approx(math.hypot(*errors) / 2)
    assert [(f.task, f.documents) for f in figures(report) if f.metric == "acc"] == [
        ("both", 7),
        ("one", 5),
        ("two", 2),
    ]


# ------------------------------------------------------------------------------------------- the lab's tasks


def lab(name: str, limit: int) -> tuple[Report, Any]:
    model = eval_models.policy(max_position_embeddings=512)
    return measured(name, model, limit=limit), model


def test_bits_per_byte_of_the_lab_are_those_of_pretraining() -> None:
    report, model = lab("lab_text", 12)
    texts = [row["text"] for row in rows("lab/text", "test", documents=12)]
    expected = bits_per_byte(model, eval_models.tokenizer(), texts)
    assert report["results"]["lab_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    assert report["lengths"]["in_pieces"] == 0


def test_instructions_are_asked_as_a_user_does_and_scored_by_gold() -> None:
    report, _ = lab("lab_instructions", 14)
    samples = report["samples"]["lab_instructions"]
    truth = {name: [one["doc"][name] for one in samples] for name in TRUTH_COLUMNS}
    scores = gold(
        [one["doc"]["prompt"] for one in samples], [one["filtered_resps"][0] for one in samples], **truth
    )
    assert report["results"]["lab_instructions"]["gold,none"] == pytest.approx(sum(scores) / 14)
    assert report["settings"]["apply_chat_template"] is True
    assert report["variant"] == ["first-14"]
    several = next(one for one in samples if len(one["doc"]["prompt"]) == 3)
    asked = several["arguments"][0][0]
    assert asked.count("<|user|>") == 2
    assert asked.endswith("<|end|><|assistant|>")


def test_facts_are_offered_completed_and_asked() -> None:
    row = next(rows("lab/facts", "test"))
    right = row["choices"][row["gold"]]
    asked = {task.name: task for task in load_tasks(["lab"])}
    assert set(asked) == {"lab_completion", "lab_facts", "lab_instructions", "lab_questions", "lab_text"}
    found = {name: lab(name, 1)[0]["samples"][name][0]["arguments"] for name in asked if name != "lab_text"}
    assert found["lab_facts"][row["gold"]] == [row["context"], f" {right}"]
    assert found["lab_completion"] == [[row["context"], f" {right}"]]
    assert found["lab_questions"][row["gold"]] == [
        f"<|bos|><|user|>{row['question']}<|end|><|assistant|>",
        right,
    ]


# --------------------------------------------------------------------------------------------- names of tasks


def test_stock_tasks_by_name_say_what_is_wrong_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"arc_easi: .* Did you mean arc_easy"):
        load_tasks(["arc_easi"])
    with pytest.raises(UsageError) as found:
        load_tasks(["arc_easy"])
    message = str(found.value)
    assert "allenai/ai2_arc (ARC-Easy), cannot be had from the Hugging Face Hub" in message
    assert "--tasks arc_easy.yaml" in message
    include = next(line for line in message.splitlines() if "include:" in line).split()[-1]
    assert Path(include).is_file()


def test_a_stock_task_on_local_files_needs_no_more_than_the_message_says(tmp_path: Path) -> None:
    """The stock file asks for three splits, and there is a file for one; it lies beside the YAML."""
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent / "arc" / "arc_easy.yaml"
    choices = {"text": ["up", "in the sea"], "label": ["A", "B"]}
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"id": "0", "question": "where?", "choices": choices, "answerKey": "B"})
    )
    path = tmp_path / "arc_easy.yaml"
    path.write_text(
        f"include: {stock}\ndataset_path: json\ndataset_name: null\n"
        "dataset_kwargs: {data_files: {test: test.jsonl}}\n"
    )
    report = measured(path)
    assert report["samples"]["arc_easy"][0]["arguments"][1] == ["Question: where?\nAnswer:", " in the sea"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"test_split": "exam"}, "is evaluated on exam, and data_files has only test"),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "none.jsonl"),
        ({"output_type": "guess"}, "output_type"),
        ({"unsafe_code": True}, "runs code that a model wrote"),
    ],
)
def test_what_is_wrong_in_a_yaml_file_is_said(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_tasks([str(quiz(tmp_path, **keys))], place="recipe.yaml:3: eval_tasks")


def test_a_missing_or_broken_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: No such file"):
        load_tasks([str(tmp_path / "none.yaml")])
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [")
    with pytest.raises(UsageError, match=r"broken\.yaml"):
        load_tasks([str(broken)])


def test_training_measures_on_validation_splits(tmp_path: Path) -> None:
    files = {"test": "quiz.jsonl", "validation": "few.jsonl"}
    (tmp_path / "few.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    path = quiz(tmp_path, dataset_kwargs={"data_files": files}, validation_split="validation")
    sizes = [load_tasks([str(path)], validation=wanted)[0].documents() for wanted in (False, True)]
    assert sizes == [5, 1]


# -------------------------------------------------------------------------------------- results and command


def test_results_lie_in_the_directory_which_stays_the_same_model(directory: Path, tmp_path: Path) -> None:
    before = identity(directory)
    path = quiz(tmp_path)
    names = [
        save_report(measured(path, **settings), directory, log_samples=True).name
        for settings in ({}, {"num_fewshot": 3, "limit": 2}, {"apply_chat_template": True})
    ]
    assert names == ["quiz.json", "quiz.3-shot.first-2.json", "quiz.chat.json"]
    assert identity(directory) == before
    assert len((directory / "eval" / "quiz.jsonl").read_text().splitlines()) == len(QUESTIONS)
    assert "samples" not in json.loads((directory / "eval" / "quiz.json").read_text())


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    cli.app(args=["eval", *words], prog_name="trueup", standalone_mode=False)
    return capsys.readouterr().out


def test_the_command_shows_scores_of_models_side_by_side(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    eval_models.policy(seed=1).save_pretrained(other)
    eval_models.tokenizer().save_pretrained(other)
    tasks = f"{quiz(tmp_path)},{prose(tmp_path)}"
    shown = run(capsys, str(directory), str(other), "--tasks", tasks, "--device", "cpu")
    header = next(line for line in shown.splitlines() if line.startswith("task"))
    assert header.split() == ["task", "metric", "policy", "other"]
    assert "quiz: 5 documents, 0-shot, without chat template, guessing gives" in shown
    assert (other / "eval" / "quiz.json").exists()
    [reports] = json.loads(run(capsys, str(directory), "--tasks", tasks, "--limit", "2", "--json"))
    assert [one["identity"] for one in reports] == [identity(directory)] * 2
    assert reports[0]["n-samples"]["quiz"]["effective"] == 2


def test_an_adapter_is_evaluated_on_its_base(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        eval_models.policy(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    words = ("--tasks", str(prose(tmp_path)), "--json")
    [[found]] = json.loads(run(capsys, str(tmp_path / "adapter"), *words, "--base", str(directory)))
    expected = measured(tmp_path / "prose.yaml", adapted)["results"]["prose"]["bits_per_byte,none"]
    assert found["results"]["prose"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
    assert (tmp_path / "adapter" / "eval" / "prose.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL"], "name what to measure: --tasks"),
        (["MODEL", "--tasks", " ,"], "name what to measure: --tasks"),
        (["none/such/place", "--tasks", "lab_facts"], "no such model directory"),
        (["MODEL", "--tasks", "lab_facts", "--base", "x"], "is no adapter"),
        (["MODEL", "MODEL", "--tasks", "lab_facts", "--output_dir", "x"], "is for one model"),
        (["MODEL", "--tasks", "lab_facts", "--device", "abacus"], "--device abacus"),
    ],
)
def test_wrong_usage_is_said(words: list[str], message: str, directory: Path) -> None:
    words = [str(directory) if word == "MODEL" else word for word in words]
    with pytest.raises(TrueupError, match=message):
        cli.app(args=["eval", *words], prog_name="trueup", standalone_mode=False)


def test_a_tokenizer_without_template_cannot_chat(tmp_path: Path) -> None:
    import copy

    [task] = load_tasks([str(quiz(tmp_path))])
    silent = copy.deepcopy(eval_models.tokenizer())
    silent.chat_template = None
    with pytest.raises(UsageError, match="the tokenizer has none"):
        evaluate(eval_models.policy(), silent, task, EvalSettings(apply_chat_template=True))


# ------------------------------------------------------------------------------------------------- real data

DATA = Path(os.environ.get("TRUEUP_DATA", Path(__file__).parents[2] / "shared" / "data")) / "eval"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA}: set TRUEUP_DATA to the test data")
def test_stock_tasks_run_on_local_files(tmp_path: Path) -> None:
    """arc_easy and piqa, two of BLiMP as a group, and COPA as a task of one's own."""
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent

    def local(name: str, include: str, split: str, file: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"include: {stock / include}\ntask: {name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{split}: {DATA / file}}}}}\n"
        )
        return path

    paths = [
        local("arc_easy", "arc/arc_easy.yaml", "test", "lmeval_arc_easy.jsonl"),
        local("piqa", "piqa/piqa.yaml", "validation", "lmeval_piqa.jsonl"),
    ]
    pairs = ["anaphor_gender_agreement", "irregular_past_participle_verbs"]
    for name in pairs:
        local(f"blimp_{name}", f"blimp/{name}.yaml", "train", f"blimp/{name}.jsonl.gz")
    group = tmp_path / "blimp_two.yaml"
    metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]
    members = [f"blimp_{name}" for name in pairs]
    group.write_text(json.dumps({"group": "blimp_two", "task": members, "aggregate_metric_list": metrics}))
    copa = [json.loads(line) for line in (DATA / "raw_copa.jsonl").read_text().splitlines()]
    own = write_task(
        tmp_path, "copa", copa, output_type="multiple_choice", doc_to_text="query", doc_to_choice="choices",
        doc_to_target="gold", metric_list=[{"metric": "acc", "aggregation": "mean"}],
    )  # fmt: skip
    tasks = {task.name: task for path in [*paths, group, own] for task in load_tasks([str(path)])}
    sizes = {name: task.documents() for name, task in tasks.items()}
    assert sizes == {"arc_easy": 2376, "piqa": 1838, "blimp_two": 2000, "copa": 100}
    found = {name: small(task) for name, task in tasks.items()}
    good = found["blimp_two"]["samples"][members[0]][0]
    assert good["arguments"][0] == ["", " Katherine can't help herself."]
    assert found["piqa"]["chance"]["piqa"] == 0.5
    assert tasks["blimp_two"].documents(limit=4) == 8
    assert all(0 <= figure.value <= 1 for report in found.values() for figure in figures(report))


def small(task: LoadedTask) -> Report:
    return evaluate(eval_models.policy(), eval_models.tokenizer(), task, EvalSettings(limit=4))


def test_our_tasks_travel_with_the_package() -> None:
    assert {path.stem for path in OURS.glob("*.yaml")} >= {"lab_facts", "lab_text"}
