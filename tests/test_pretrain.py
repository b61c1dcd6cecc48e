"""The pretraining stage as the runner drives it: what it writes, resuming bit for bit, and how it says no."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueup.base import batches
from trueup.base.configuration_gpt import CHOICES, GPTConfig
from trueup.base.device import peak_flops
from trueup.base.interrupt import Interrupted, StopRequest
from trueup.base.loss import IGNORED, linear_cross_entropy
from trueup.base.pretrain import GPTArguments, PretrainRecipe
from trueup.base.pretrain_loop import NextTokenLoss, Pretraining
from trueup.recipes.directory import identity, open_directory
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import Entry, RecipeError, read_recipe
from trueup.recipes.run import Run, open_run

SETTINGS: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_length": 32,
    "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "save_steps": 4,
    "eval_steps": 8, "logging_steps": 2, "sample_prompts": ["The cat"], "use_cpu": True, "bf16": False,
    "fp16": False, "seed": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps its state per process, and the token cache lies in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Documents of 2 to 60 words over a small vocabulary, enough of them for every split."""
    rng = np.random.default_rng(0)
    words = np.array(["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "old", "tree"])
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choice(words, rng.integers(2, 60))) + "."}) for _ in range(300)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def opened(corpus: Path, tmp_path: Path) -> Callable[..., tuple[Run, PretrainRecipe]]:
    """A run and its stage, made as the runner makes them."""

    def build(name: str = "out", **changes: Any) -> tuple[Run, PretrainRecipe]:
        values = SETTINGS | {"dataset_name": str(corpus), "output_dir": str(tmp_path / name)} | changes
        recipe = read_recipe(None, "pretrain", [Entry(k, v, "test") for k, v in values.items() if v != ""])
        return open_run(recipe)

    return build


@pytest.fixture
def train(opened: Callable[..., tuple[Run, PretrainRecipe]]) -> Callable[..., Run]:
    def go(name: str = "out", **changes: Any) -> Run:
        run, stage = opened(name, **changes)
        with run.working():
            stage.run(run)
        return run

    return go


@pytest.fixture
def loop(opened: Callable[..., tuple[Run, PretrainRecipe]]) -> Callable[..., Pretraining]:
    """The training loop before its first step."""

    def build(name: str = "out", **changes: Any) -> Pretraining:
        run, stage = opened(name, **changes)
        run.prepare()
        return Pretraining(stage, run)

    return build


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to this process while it prepares a step."""
    original = batches.PackedBatches.step

    def signalled(self: Any, number: int) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, number)

    monkeypatch.setattr(batches.PackedBatches, "step", signalled)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("rows", [7, 64])
def test_chunked_loss_is_torchs_loss_and_has_its_gradients(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("trueup.base.loss").base.loss.SLICE_LOGITS, "cpu", 50 * 9)
    torch.manual_seed(0)
    hidden = torch.randn(rows, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (rows,))
    labels[::3] = IGNORED
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    found = linear_cross_entropy(hidden, weight, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(found * 0.5, [hidden, weight]),
        torch.autograd.grad(expected * 0.5, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_packed_documents_cost_what_they_cost_alone(loop: Callable[..., Pretraining]) -> None:
    """The loop's loss of packed rows = the model's own loss of each document by itself."""
    trainer = loop(logit_scale=0.7)
    packed = trainer.inputs.packed
    assert packed is not None
    rows = range(len(packed) - 6, len(packed))  # the shortest documents are in the last rows
    batch = packed.batch(rows, 6)
    assert len(set(batch.documents)) > 6
    found = trainer.loss(**trainer._tensors(batch))
    alone = 0.0
    for segment in range(packed.rows[rows[0]], packed.rows[-1]):
        start, length = packed.starts[segment], packed.lengths[segment]
        ids = torch.from_numpy(packed.documents.tokens[start : start + length + 1].astype(np.int64))[None]
        alone += trainer.model(ids, labels=ids).loss.item() * int(length)
    assert found.item() / batch.targets == pytest.approx(alone / batch.targets, abs=1e-6)


def test_flash_rows_laid_end_to_end_give_the_same_loss(loop: Callable[..., Pretraining]) -> None:
    trainer = loop()
    assert trainer.inputs.packed is not None
    tensors = trainer._tensors(trainer.inputs.packed.batch(range(4), 4))
    torch.testing.assert_close(NextTokenLoss(trainer.model, one_row=True)(**tensors), trainer.loss(**tensors))


@pytest.mark.parametrize("other", [{"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}])
def test_accumulation_is_one_big_batch(loop: Callable[..., Pretraining], other: dict[str, int]) -> None:
    results = []
    for name, changes in (("one", {"per_device_train_batch_size": 8}), ("many", other)):
        trainer = loop(name, optim="adamw_torch_fused", **changes)
        figures = [trainer.step(step, StopRequest())[0] for step in range(2)]
        results.append(([(f["loss"], f["grad_norm"]) for f in figures], trainer.tokens))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert np.array(results[0][0]) == pytest.approx(np.array(results[1][0]), rel=2e-5)
    assert results[0][1] == results[1][1]


def test_gradients_are_clipped_and_their_norm_is_the_one_before(loop: Callable[..., Pretraining]) -> None:
    trainer = loop(max_grad_norm=0.01)
    norms = []
    for optimizer in trainer.optimizers:
        optimizer.step = lambda: norms.append(  # type: ignore[method-assign]
            math.sqrt(sum(p.grad.pow(2).sum().item() for p in trainer.loss.parameters()))
        )
    figures, _ = trainer.step(0, StopRequest())
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert figures["grad_norm"] > 0.1


# ---------------------------------------------------------------- what is written


def test_a_run_writes_a_whole_model_directory(train: Callable[..., Run]) -> None:
    run = train()
    assert run.done()
    record = open_directory(run.output_dir, "causal-lm").record
    log = [json.loads(line) for line in (run.output_dir / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert [row["step"] for row in log if "loss" in row] == [2, 4, 6, 8]
    assert losses[-1] < losses[0]
    assert record["metrics"]["bits_per_byte"] == log[-1]["bits_per_byte"]
    assert record["tokens"] == record["metrics"]["tokens"] <= 8 * 4 * 32
    assert log[-1]["samples"][0].startswith("The cat")
    assert (run.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.work_dir.glob("checkpoint-*"))
    names = set(load_file(run.output_dir / "model.safetensors"))
    assert "model.embed_tokens.weight" in names
    assert not any("_orig_mod" in name or name.startswith("model.model") for name in names)

    config = json.loads((run.output_dir / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(run.output_dir)
    model = AutoModelForCausalLM.from_pretrained(run.output_dir)
    assert tokenizer.chat_template
    assert config["max_position_embeddings"] == tokenizer.model_max_length == 32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_held_out_bits_per_byte_is_the_cost_of_the_documents(train: Callable[..., Run]) -> None:
    from trueup.base.data import load_data

    run = train(max_length=256)
    tokenizer = AutoTokenizer.from_pretrained(run.output_dir)
    model = AutoModelForCausalLM.from_pretrained(run.output_dir)
    nats = size = 0.0
    for row in load_data(run.recipe.build(), "validation", "text"):
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size += len(row["text"].encode())
    metrics = open_directory(run.output_dir).record["metrics"]
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(train: Callable[..., Run]) -> None:
    first = identity(train("a", residual_dropout=0.1).output_dir)
    assert identity(train("b", residual_dropout=0.1).output_dir) == first
    assert identity(train("c", residual_dropout=0.1, seed=2).output_dir) != first


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True, "activation_checkpointing": True, "attention_dropout": 0.1},
        {"fp16": True},
        {"optim": "muon", "lr_scheduler_type": "warmup_stable_decay", "muon_learning_rate": 0.01},
        {"attn_implementation": "sdpa", "tie_word_embeddings": False, "report_to": "tensorboard"},
        {"dataset_streaming": True, "gradient_accumulation_steps": 2},
    ],
    ids=["bf16", "fp16", "muon", "untied", "stream"],
)
def test_other_ways_to_train(train: Callable[..., Run], changes: dict[str, Any]) -> None:
    run = train(**changes)
    log = [json.loads(line) for line in (run.output_dir / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    if "report_to" in changes:
        assert list(run.work_dir.rglob("events.out.tfevents*"))


def test_an_epoch_is_all_rows_once(loop: Callable[..., Pretraining]) -> None:
    trainer = loop(max_steps=-1, num_train_epochs=2.0, warmup_steps=0.1)
    assert trainer.inputs.packed is not None
    assert trainer.plan.steps == math.ceil(2 * len(trainer.inputs.packed) / 4)
    assert trainer.plan.warmup == math.ceil(0.1 * trainer.plan.steps)


def test_a_tokenizer_from_a_model_directory_becomes_a_parent(train: Callable[..., Run]) -> None:
    first = train("first")
    run = train("second", tokenizer_name_or_path=str(first.output_dir), vocab_size="")
    assert open_directory(run.output_dir).record["parents"]["tokenizer_name_or_path"]["identity"]
    assert (run.output_dir / "tokenizer.json").read_bytes() == (
        first.output_dir / "tokenizer.json"
    ).read_bytes()


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize(
    ("streaming", "stop"), [(False, 3), (True, 3), (False, 7)], ids=["disk", "stream", "last step"]
)
def test_a_stopped_run_goes_on_bit_for_bit(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: Any, streaming: bool, stop: int
) -> None:
    changes = {
        "residual_dropout": 0.1,
        "attention_dropout": 0.1,
        "dataset_streaming": streaming,
        "save_steps": 3,
    }
    whole = train("whole", **changes)
    target = batches.StreamBatches if streaming else batches.PackedBatches
    original = target.step

    def signalled(self: Any, step: int) -> Any:
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(target, "step", signalled)
        with pytest.raises(Interrupted, match=f"SIGTERM after step {stop + 1} of 8") as stopped:
            train("stopped", **changes)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    resumed = train("stopped", **changes)
    assert "resuming from" in capsys.readouterr().out
    assert identity(resumed.output_dir) == identity(whole.output_dir)
    losses = [
        [row.get("loss") for row in map(json.loads, (run.output_dir / "log.jsonl").read_text().splitlines())]
        for run in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    assert (
        open_directory(resumed.output_dir).record["tokens"]
        == open_directory(whole.output_dir).record["tokens"]
    )


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "unmarked"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, damage: str
) -> None:
    whole = identity(train("whole").output_dir)
    with monkeypatch.context() as patched:
        interrupt_at(5, patched)
        with pytest.raises(Interrupted):
            train("stopped")
    newest = tmp_path / "stopped.work" / "checkpoint-6"
    weights = newest / "optimizer.bin"
    content = bytearray(weights.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        weights.unlink()
    else:
        (newest / "checksums.json").unlink()
    capsys.readouterr()
    resumed = train("stopped")
    said = capsys.readouterr().out
    assert "checkpoint-6: " in said
    assert "removed" in said
    assert f"resuming from {tmp_path / 'stopped.work' / 'checkpoint-4'}" in said
    assert identity(resumed.output_dir) == whole


def test_checkpoints_beyond_the_limit_and_leftovers_go(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "out.work"
    interrupt_at(6, monkeypatch)
    with pytest.raises(Interrupted):
        train(save_steps=1, save_total_limit=3)
    assert sorted(path.name for path in work.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (5, 6, 7)]
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    leftover = work / ".checkpoint-9.partial-1"
    leftover.mkdir()
    train(save_steps=1, save_total_limit=3)
    assert not leftover.exists()


def test_resume_from_checkpoint_chooses(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(5, patched)
        with pytest.raises(Interrupted):
            train()
    with pytest.raises(UsageError, match="no such checkpoint"):
        train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    capsys.readouterr()
    with monkeypatch.context() as patched:
        interrupt_at(7, patched)
        with pytest.raises(Interrupted):
            train(resume_from_checkpoint=str(tmp_path / "out.work" / "checkpoint-4"))
    whole = train("whole")
    assert identity(train(resume_from_checkpoint=False).output_dir) == identity(whole.output_dir)
    assert "resuming" not in capsys.readouterr().out


def test_another_batch_size_cannot_be_resumed(loop: Callable[..., Pretraining]) -> None:
    trainer = loop()
    with pytest.raises(UsageError, match="8 rows a step, and this run would take 4"):
        trainer._resumed({"step": 3, "tokens": 1, "rows_per_step": 8})


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal: a process in the background is started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_twice_stops_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)


# ---------------------------------------------------------------- saying no


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt(
    loop: Callable[..., Pretraining],
) -> None:
    trainer = loop()
    trainer.step(0, StopRequest())
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    ruined = trainer.model.model.layers[0].mlp.down_proj
    hook = ruined.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(
        TrueupError, match=r"step 2: loss and grad_norm not finite.*documents \d+.*learning_rate"
    ):
        trainer.step(1, StopRequest())
    hook.remove()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 5, "num_train_epochs": 2}, "num_train_epochs and max_steps both say how long"),
        ({"dataset_streaming": True}, "dataset_streaming needs max_steps"),
        ({"tokenizer_name_or_path": "x", "vocab_size": 500}, "vocab_size is the tokenizer's own"),
        ({"muon_learning_rate": 0.1}, "muon_learning_rate is read with optim: muon alone"),
        ({"optim": "muon", "fp16": True}, "optim muon works in bf16"),
        ({"bf16": True, "fp16": True}, "fp16 and bf16 exclude each other"),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "lr_scheduler_kwargs has min_lr: 0.1; .* min_lr_rate"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size=384"),
        ({"logit_scale": -1.0}, "logit_scale -1.0 must be above 0"),
        ({"max_length": 128, "max_position_embeddings": 64}, "max_position_embeddings is smaller"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"vocab_size": 100}, "vocab_size must be at least 279"),
    ],
)
def test_contradictions_are_told_by_key(changes: dict[str, Any], message: str) -> None:
    entries = [Entry(key, value, "test") for key, value in ({"output_dir": "x"} | changes).items()]
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(None, "pretrain", entries)
    assert len(error.value.problems) == 1


def test_an_unknown_tracker_or_tokenizer_is_named(loop: Callable[..., Pretraining], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="report_to: nothing_such is not installed"):
        loop(report_to="nothing_such")
    with pytest.raises(UsageError, match=r"tokenizer_name_or_path: .*nowhere"):
        loop(tokenizer_name_or_path=str(tmp_path / "nowhere"), vocab_size="")


# ---------------------------------------------------------------- the recipe


def test_the_shape_keys_are_the_configs_fields_and_defaults() -> None:
    """GPTArguments repeats GPTConfig, which is no dataclass that a recipe could inherit from."""
    config = {name: value for name, value in vars(GPTConfig).items() if name in GPTConfig.__annotations__}
    given_elsewhere = {
        "vocab_size", "reward_mean", "reward_std", "use_cache", "bos_token_id", "eos_token_id",
        "pad_token_id", "model_type", "keys_to_ignore_at_inference", "_auto_class", "base_model_tp_plan",
            "base_model_pp_plan",
    }  # fmt: skip
    ours = {key.name: key for key in fields(GPTArguments)}
    assert set(ours) == set(GPTConfig.__annotations__) - given_elsewhere
    for name, key in ours.items():
        if name != "max_position_embeddings":
            assert key.default == config[name], name
        if name in CHOICES:
            assert get_args(GPTArguments.__annotations__[name]) == CHOICES[name]


def test_every_key_is_explained() -> None:
    unexplained = [key.name for key in fields(PretrainRecipe) if not key.metadata.get("help")]
    assert unexplained == []


def test_the_peak_of_a_processor_is_measured() -> None:
    flops, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < flops < 1e14
    assert "timed here" in source
