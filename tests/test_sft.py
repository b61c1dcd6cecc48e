"""SFT: the loss is what it says, only answers are trained, packing changes nothing, runs resume exactly."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sft_models import ROWS, run, write_base

from trueup.recipes.directory import identity, open_directory, read_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import RecipeError
from trueup.recipes.run import open_run


def prepared(recipe: Any) -> Any:
    """The stage's trainer with its data prepared, not yet trained."""
    from trueup.base.stage import load_model, load_tokenizer

    stage = recipe.build()
    values = recipe.values | {"max_length": min(64, recipe.values["max_length"])}
    return stage.trainer(values, Path(recipe.values["output_dir"]), load_model(stage), load_tokenizer(stage))


def first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def trained_texts(trainer: Any) -> list[str]:
    return [
        trainer.processing_class.decode([i for i in row["labels"] if i != -100])
        for row in trainer.train_dataset
    ]


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("lean", [True, False], ids=["ours", "trl"])
@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_mean_log_loss_of_the_answers(recipe: Any, packing: bool, lean: bool) -> None:
    trainer = prepared(recipe(packing=packing))
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = first_batch(trainer)
    trainer.lean_loss = lean
    loss = trainer.compute_loss(trainer.model, dict(batch))

    nats, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in documents(batch):
            logits = trainer.model(ids[None]).logits[0]
            for position in range(1, len(ids)):
                if labels[position] != -100:
                    nats -= F.log_softmax(logits[position - 1].double(), -1)[ids[position]].item()
                    count += 1
    assert count > 20
    assert loss.item() == pytest.approx(nats / count, abs=2e-6)


def documents(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of every document of a batch, packed or padded."""
    found = []
    for row, ids in enumerate(batch["input_ids"]):
        if "attention_mask" in batch:
            pieces = [int(batch["attention_mask"][row].sum())]
        else:
            starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), len(ids)]
            pieces = [end - start for start, end in pairwise(starts)]
        for part, labels in zip(
            ids[: sum(pieces)].split(pieces), batch["labels"][row][: sum(pieces)].split(pieces), strict=True
        ):
            found.append((part, labels))
    return found


def test_our_loss_and_trls_have_the_same_gradients(recipe: Any) -> None:
    trainer = prepared(recipe(packing=True))
    batch, gradients = first_batch(trainer), []
    for lean in (True, False):
        trainer.lean_loss = lean
        trainer.model.train()
        trainer.model.zero_grad()
        torch.manual_seed(0)
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(37)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- what is trained


def test_exactly_the_assistants_words_and_their_end_are_trained(recipe: Any) -> None:
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is 1?"},
        {"role": "assistant", "content": "it is 1"},
        {"role": "user", "content": "what is 2?"},
        {"role": "assistant", "content": "it is 2 indeed"},
    ]
    trainer = prepared(recipe([{"messages": talk}] * 2, validation_split_size=0, test_split_size=0))
    assert trained_texts(trainer) == ["it is 1<|end|>it is 2 indeed<|end|>"] * 2


FORMS = {
    "messages": ({"messages": ROWS[3]["messages"]}, "messages", "it is 9 indeed indeed indeed<|end|>"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "it is 4"}]},
        "messages",
        "it is 4<|end|>",
    ),
    "Alpaca": ({"instruction": "square", "input": "2", "output": "it is 4"}, "messages", "it is 4<|end|>"),
    "prompt+completion, chat": (
        {
            "prompt": [{"role": "user", "content": "what?"}],
            "completion": [{"role": "assistant", "content": "it is 4"}],
        },
        "prompt_completion",
        "it is 4<|end|>",
    ),
    "prompt+completion": (
        {"prompt": "2 times 2", "completion": " is 4"},
        "prompt_completion",
        " is 4<|end|>",
    ),
    "text": ({"text": "what is 2? it is 4"}, "text", "<|bos|>what is 2? it is 4<|end|>"),
}


@pytest.mark.parametrize(("row", "form", "trained"), FORMS.values(), ids=FORMS)
def test_every_form_of_data_trains_its_answers(recipe: Any, row: Any, form: str, trained: str) -> None:
    whole = {"validation_split_size": 0, "test_split_size": 0}
    trainer = prepared(recipe([row] * 8, dataset_form=form, **whole))
    assert trained_texts(trainer) == [trained] * 8
    loss = trainer.training_step(trainer.model, first_batch(trainer), torch.tensor(10))
    assert math.isfinite(loss)


DATA = Path(os.environ.get("TRUEUP_DATA", Path(__file__).parents[2] / "shared" / "data")) / "sft"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA}: set TRUEUP_DATA to the test data")
@pytest.mark.parametrize("form", ["messages", "prompt_completion"])
@pytest.mark.parametrize(
    "name", ["dolly_hhrlhf_small", "gsm8k_train", "rasbt_instruction_data", "self_instruct_seed_tasks"]
)
def test_real_files_train(recipe: Any, tmp_path: Path, name: str, form: str) -> None:
    model = str(write_base(tmp_path / "wide", max_position_embeddings=1024))
    keys = {
        "model_name_or_path": model,
        "dataset_name": str(DATA / f"{name}.jsonl"),
        "dataset_form": form,
        "eval_strategy": "epoch",
    }
    directory = run(recipe(max_steps=3, packing=True, skip_bad_rows=True, **keys))
    metrics = read_json(directory / "trueup.json")["metrics"]
    assert 0.1 < metrics["trained_fraction"] < 0.95
    assert math.isfinite(metrics["eval_loss"])


def test_rows_whose_answer_is_cut_off_are_counted_and_left_out(recipe: Any) -> None:
    long = {"messages": [{"role": "user", "content": "what " * 70}, ROWS[0]["messages"][1]]}
    keys = {"validation_split_size": 0, "test_split_size": 0, "max_length": 24}
    for packing in (False, True):
        trainer = prepared(recipe([*ROWS[:9], long], packing=packing, **keys))
        report = trainer.reports["train"]
        assert (report.rows, report.emptied, report.truncated) == (9, 1, 1)
        assert "left out: 1 rows" in "\n".join(report.lines())
        assert sum(text.count("<|end|>") for text in trained_texts(trainer)) == 9


def test_the_trained_fraction_is_what_the_labels_say(recipe: Any) -> None:
    trainer = prepared(recipe())
    labels = [label for row in trainer.train_dataset for label in row["labels"]]
    expected = sum(label != -100 for label in labels) / len(labels)
    assert trainer.reports["train"].fraction == pytest.approx(expected)
    assert f"{expected:.1%} of them trained" in trainer.reports["train"].lines()[0]


# ---------------------------------------------------------------- running


def test_a_run_writes_a_directory_that_opens_alone_and_repeats_exactly(recipe: Any, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = run(recipe(name="first", eval_strategy="steps", eval_steps=3))
    again = run(recipe(name="again", eval_strategy="steps", eval_steps=3))
    assert identity(first) == identity(again) == open_directory(first, "causal-lm").identity
    assert identity(first) != identity(base)
    record = read_json(first / "trueup.json")
    assert record["metrics"]["eval_loss"] < 6
    assert 0 < record["metrics"]["trained_fraction"] < 1
    assert record["tokens"] > 300
    assert record["parents"]["model_name_or_path"]["identity"] == identity(base)
    assert read_json(first / "config.json")["use_cache"] is True
    assert len(read_json(first / "config.json")["auto_map"]) == 4
    assert (first / "loss.png").stat().st_size > 5_000
    model = AutoModelForCausalLM.from_pretrained(first)
    tokenizer = AutoTokenizer.from_pretrained(first)
    prompt = tokenizer.apply_chat_template(
        ROWS[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    recipe: Any, packing: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trueup.base.interrupt import Interrupted
    from trueup.sft.trainer import SFTTrainer

    whole = run(recipe(name="whole", packing=packing, num_train_epochs=3, max_steps=-1))
    step, usual = [0], SFTTrainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        step[0] += 1
        if step[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, *args, **kwargs)

    broken = recipe(name="broken", packing=packing, num_train_epochs=3, max_steps=-1)
    monkeypatch.setattr(SFTTrainer, "training_step", stopping)
    with pytest.raises(Interrupted, match="after step 3 of"):
        run(broken)
    work = Path(broken.values["output_dir"] + ".work")
    assert not Path(broken.values["output_dir"]).exists()
    # The newest checkpoint is damaged: the one before it is used, and said so.
    with (work / "checkpoint-3" / "optimizer.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff\xff\xff")
    assert identity(run(broken)) == identity(whole)
    assert "checkpoint-3: optimizer.pt missing or damaged" in capsys.readouterr().out
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in log if "loss" in event]
    assert steps == sorted(set(steps))
    assert not list(work.glob("checkpoint-*"))


def test_a_run_killed_after_its_last_step_only_writes_the_directory(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trueup.recipes.run import Run

    whole = run(recipe(name="whole"))
    broken = recipe(name="broken")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "publish", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            run(broken)
    assert identity(run(broken)) == identity(whole)
    assert read_json(Path(broken.values["output_dir"]) / "trueup.json")["metrics"]["steps"] == 6


def test_a_checkpoint_can_be_named_or_refused(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trueup.base import trainer

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "publish", lambda *args, **kwargs: None)
        run(recipe(save_total_limit=None))
    work = Path(recipe().values["output_dir"] + ".work")
    for wanted, message in ((str(work / "checkpoint-4"), "going on from step 4 of 6"), (None, "step 6 of 6")):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "publish", lambda *args, **kwargs: None)
            run(recipe(save_total_limit=None, resume_from_checkpoint=wanted))
        assert message in capsys.readouterr().out
    with pytest.raises(UsageError, match="resume_from_checkpoint: nowhere: no such checkpoint"):
        run(recipe(save_total_limit=None, resume_from_checkpoint="nowhere"))
    run(recipe(save_total_limit=None, resume_from_checkpoint=False))
    assert "going on" not in capsys.readouterr().out


def test_the_best_model_is_the_one_that_is_kept_and_measured(recipe: Any) -> None:
    # A rate this high ruins the model after a few steps: the last one is not the best.
    keys = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "warmup_steps": 0}
    directory = run(recipe(learning_rate=1.0, lr_scheduler_type="constant", max_steps=8, **keys))
    log = [json.loads(line) for line in (Path(f"{directory}.work") / "log.jsonl").read_text().splitlines()]
    losses = [event["eval_loss"] for event in log if "eval_loss" in event]
    assert min(losses[:4]) < losses[3] - 0.1
    assert read_json(directory / "trueup.json")["metrics"]["eval_loss"] == pytest.approx(
        min(losses[:4]), abs=1e-6
    )


@pytest.mark.faults
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(recipe: Any) -> None:
    """kill -9 ten times, each at a random moment of the half second after a checkpoint was begun."""
    start = "import sys; from trueup.app.cli import main; main(['sft', '--config', sys.argv[1]])"
    keys: dict[str, Any] = {"max_steps": 1000, "save_steps": 5, "packing": True}
    whole, broken = run(recipe(name="whole", **keys)), recipe(name="broken", **keys)
    command = [sys.executable, "-c", start, str(broken.source)]
    output, moments = Path(broken.values["output_dir"]), random.Random(0)
    for _ in range(10):
        before = newest_number(output)
        child = subprocess.Popen(command, start_new_session=True)
        while child.poll() is None and newest_number(output) <= before:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.5))
        assert child.poll() is None, "it ended before it could be killed"
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert not output.exists()
    subprocess.run(command, check=True)
    assert identity(output) == identity(whole)


def newest_number(output: Path) -> int:
    """The step of the newest checkpoint, complete or not; 0 before the first."""
    names = [path.name for path in Path(f"{output}.work").glob("checkpoint-*")]
    return max([int(name.split("-")[1]) for name in names], default=0)


def test_a_checkpoint_without_its_checksums_is_not_used(tmp_path: Path) -> None:
    from trueup.base.trainer import newest_checkpoint

    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoint-4").exists()


def test_only_so_many_checkpoints_are_kept(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trueup.base import trainer

    monkeypatch.setattr(trainer, "publish", lambda *args, **kwargs: None)
    ready, stage = open_run(recipe(save_steps=1))
    with ready.working():
        stage.run(ready)
    assert [path.name for path in trainer.checkpoints(ready.work_dir)] == ["checkpoint-6", "checkpoint-5"]


@pytest.mark.parametrize(
    "keys",
    [{"neftune_noise_alpha": 5.0}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"bf16": True}],
)
def test_further_keys_of_sftconfig_train(recipe: Any, keys: dict[str, Any]) -> None:
    plain, changed = run(recipe(name="plain", max_steps=2)), run(recipe(name="changed", max_steps=2, **keys))
    assert identity(plain) != identity(changed)


# ---------------------------------------------------------------- saying no


def test_a_loss_that_is_not_finite_stops_with_advice(recipe: Any) -> None:
    with pytest.raises(TrueupError, match=r"step \d: the (loss|gradient).*Lower learning_rate"):
        run(recipe(learning_rate=1e30, max_grad_norm=0.0, warmup_steps=0))


WRONG = {
    "num_train_epochs": ({"num_train_epochs": 1}, "both say how long to train"),
    "fp16": ({"fp16": True, "bf16": True}, "exclude each other"),
    "assistant_only_loss": (
        {"dataset_form": "text", "assistant_only_loss": True},
        "needs dataset_form: messages",
    ),
    "completion_only_loss": ({"completion_only_loss": True}, "needs dataset_form: prompt_completion"),
    "packing": ({"packing": True, "max_length": None}, "needs a max_length"),
    "padding_free": ({"padding_free": True}, "does not truncate"),
    "eval_steps": ({"eval_steps": 5}, "eval_strategy: steps"),
    "dataset_streaming": ({"dataset_streaming": True, "max_steps": -1}, "needs max_steps"),
    "lora_r": ({"lora_r": 8}, "add use_peft: true"),
    "bnb_4bit_quant_type": ({"bnb_4bit_quant_type": "fp4"}, "load_in_4bit"),
    "load_in_8bit": ({"use_peft": True, "load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
}


@pytest.mark.parametrize("key", WRONG)
def test_keys_that_contradict_each_other_are_named(recipe: Any, key: str) -> None:
    keys, message = WRONG[key]
    with pytest.raises(RecipeError, match=rf"out\.yaml:\d+: {key} .*{message}"):
        recipe(**keys)


def test_a_length_beyond_the_models_context_is_refused(recipe: Any) -> None:
    with pytest.raises(UsageError, match="max_length: 128 is more than the model's 64 positions"):
        run(recipe(max_length=128))


def with_template(base: Path, target: Path, change: Callable[[str], str] | None) -> str:
    """A copy of the base model with another chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = change(tokenizer.chat_template) if change else None
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


TEMPLATES: dict[str, tuple[Callable[[str], str] | None, str]] = {
    "none": (None, "has no chat template"),
    "unmarked": (
        lambda text: text.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
        .replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""),
        "does not mark what the assistant says",
    ),
    "end not trained": (
        lambda text: text.replace(
            "{{- eos_token -}}\n    {%- endgeneration -%}", "{%- endgeneration -%}{{- eos_token -}}"
        ),
        "would never learn to stop",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_cannot_be_trained_is_refused(
    recipe: Any, base: Path, tmp_path: Path, change: Any, message: str
) -> None:
    model = with_template(base, tmp_path / "model", change)
    with pytest.raises(UsageError, match=message):
        run(recipe(model_name_or_path=model))


def test_a_template_that_marks_everything_is_an_error(recipe: Any, base: Path, tmp_path: Path) -> None:
    everything = (
        "{%- generation -%}{%- for m in messages -%}{{ m['content'] }}{{ eos_token }}{%- endfor -%}"
        "{%- endgeneration -%}"
    )
    model = with_template(base, tmp_path / "model", lambda text: everything)
    with pytest.raises(TrueupError, match="every token is trained, prompts included"):
        run(recipe(model_name_or_path=model))


def test_data_of_which_nothing_is_trained_is_an_error(recipe: Any) -> None:
    with pytest.raises(TrueupError, match=r"not one token is trained.*raise max_length"):
        run(recipe(max_length=6))


def test_a_conversation_that_the_template_refuses_is_named(recipe: Any) -> None:
    twice = [ROWS[0]["messages"][0], ROWS[0]["messages"][0], ROWS[0]["messages"][1]]
    rows = [*ROWS[:3], {"messages": twice}]
    with pytest.raises(
        TrueupError, match=r'row 4 does not fit the chat template: .*"user" cannot follow "user"'
    ):
        run(recipe(rows, validation_split_size=0, test_split_size=0))


def test_code_that_a_model_brings_is_run_only_if_the_recipe_trusts_it(
    recipe: Any, base: Path, tmp_path: Path
) -> None:
    foreign = Path(with_template(base, tmp_path / "model", lambda text: text))
    config = read_json(foreign / "config.json")
    (foreign / "config.json").write_text(json.dumps(config | {"model_type": "somebody_elses"}))
    with pytest.raises(UsageError, match=r"brings Python code of its own.*trust_remote_code: true"):
        run(recipe(model_name_or_path=str(foreign)))


# ---------------------------------------------------------------- replay


@pytest.fixture
def old_texts(tmp_path: Path) -> str:
    """A file of what the base model might have read."""
    path = tmp_path / "read_before.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Text {n}, which was read before."}) + "\n" for n in range(400))
    )
    return str(path)


@pytest.mark.parametrize("packing", [False, True])
def test_replayed_text_makes_up_its_share_and_is_trained_whole(
    recipe: Any, old_texts: str, packing: bool
) -> None:
    trainer = prepared(
        recipe(replay_dataset_name=old_texts, replay_share=0.25, packing=packing, max_length=64)
    )
    report = trainer.reports["train"]
    share = report.replayed / (report.replayed + report.tokens)
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    assert 0.25 <= share <= 0.25 + longest / (report.replayed + report.tokens)
    assert any("replayed text" in line for line in report.lines())
    replayed = re.findall(
        r"<\|bos\|>Text \d+, which was read before\.<\|end\|>", "".join(trained_texts(trainer))
    )
    ids = trainer.processing_class(replayed, add_special_tokens=False)["input_ids"]
    assert sum(map(len, ids)) == report.replayed


def test_replay_needs_its_data_set_and_a_sane_share(recipe: Any, old_texts: str) -> None:
    with pytest.raises(RecipeError, match="replay_share is read with replay_dataset_name"):
        recipe(replay_share=0.2)
    with pytest.raises(RecipeError, match="replay_share is a share between 0 and 1"):
        recipe(replay_dataset_name=old_texts, replay_share=1.5)
