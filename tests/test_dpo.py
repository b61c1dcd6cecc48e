"""DPO: each loss is what its paper says, a start that is wrong is refused, runs resume exactly."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import offline_models
import pytest
import torch
from offline_models import PAIRS, first_batch, log_probs, prepared, run, shake
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from trueup.preference import dpo_checks
from trueup.preference.offline_trainer import FallingChosen, OfflineTrainer
from trueup.recipes.directory import identity, open_directory, read_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import RecipeError

EPSILON = 0.1  # label_smoothing


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return offline_models.write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def recipe(tmp_path: Path, start: Path) -> Callable[..., Any]:
    return offline_models.recipe_maker(tmp_path, start, "dpo")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Any:
    """Whose policy and reference differ."""
    make = offline_models.recipe_maker(tmp_path_factory.mktemp("dpo"), start, "dpo")
    found = prepared(make())
    shake(found.model)
    return found


# ----------------------------------------------------------------------------------------------- the losses


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def paper_loss(name: str, ours: Any, theirs: Any, beta: float = 0.1, e: float = EPSILON) -> float:
    """A loss from the log-probabilities of the answers' tokens, [chosen..., rejected...], by its paper."""
    half = len(ours) // 2
    p = np.array([float(one.sum()) for one in ours])
    r = np.array([float(one.sum()) for one in theirs])
    n = np.array([len(one) for one in ours])
    w, v = (p - r)[:half], (p - r)[half:]  # log-ratios of winners and losers
    d = w - v
    mean = w / n[:half] - v / n[half:]
    q = sigmoid(beta * d)
    by_rank = np.sort(p[:half] - p[half:]) - np.sort(r[:half] - r[half:])
    unpaired = np.sort(w) - np.sort(v)
    blend = sigmoid(beta * d / 0.05)
    losses = {
        "sigmoid": -log_sigmoid(beta * d),
        "sigmoid_norm": -log_sigmoid(beta * mean),
        "hinge": np.maximum(0, 1 - beta * d),
        "ipo": (mean - 1 / (2 * beta)) ** 2,
        "exo_pair": q * np.log(q / (1 - e)) + (1 - q) * np.log((1 - q) / e),
        "nca_pair": -log_sigmoid(beta * w) - 0.5 * log_sigmoid(-beta * w) - 0.5 * log_sigmoid(-beta * v),
        "robust": (-(1 - e) * log_sigmoid(beta * d) + e * log_sigmoid(-beta * d)) / (1 - 2 * e),
        "bco_pair": -log_sigmoid(beta * w) - log_sigmoid(-beta * v),
        "sppo_hard": (w - 0.5 / beta) ** 2 + (v + 0.5 / beta) ** 2,
        "aot": -(1 - e) * log_sigmoid(beta * by_rank) - e * log_sigmoid(-beta * by_rank),
        "aot_unpaired": -(1 - e) * log_sigmoid(beta * unpaired) - e * log_sigmoid(-beta * unpaired),
        "apo_zero": 1 - sigmoid(beta * w) + sigmoid(beta * v),
        "apo_down": sigmoid(beta * w) + 1 - sigmoid(beta * d),
        "discopop": -log_sigmoid(beta * d) * (1 - blend) + np.exp(-beta * d) * blend,
        "sft": -np.concatenate([one.numpy() for one in ours[:half]]),
    }
    return float(losses[name].mean())


def loss_of(trainer: Any, batch: Any, *names: str, weights: list[float] | None = None) -> float:
    trainer.loss_types, trainer.loss_weights = list(names), weights or [1.0]
    trainer.label_smoothing = EPSILON
    trainer.model.train()
    return trainer.compute_loss(trainer.model, dict(batch)).item()


@pytest.mark.parametrize("name", dpo_checks.LOSS_TYPES)
def test_each_loss_is_that_of_its_paper(trainer: Any, name: str) -> None:
    batch = first_batch(trainer)
    ours, theirs = log_probs(trainer.model, batch), log_probs(trainer.ref_model, batch)
    expected = paper_loss(name, ours, theirs)
    assert loss_of(trainer, batch, name) == pytest.approx(expected, rel=1e-4)
    assert abs(expected - paper_loss(name, theirs, theirs)) > 1e-3  # a loss that stands still tests nothing
    both = loss_of(trainer, batch, name, "sft", weights=[0.5, 0.25])
    assert both == pytest.approx(0.5 * expected + 0.25 * paper_loss("sft", ours, theirs), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_our_head_has_trls_loss_figures_and_gradients(
    recipe: Any, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for lean in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(OfflineTrainer, "_lean_head_applies", lambda self, lean=lean: lean)
            trainer = prepared(recipe(use_peft=lora))
        for parameter in trainer.model.parameters():
            parameter.requires_grad_(True)
        shake(trainer.model)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, first_batch(trainer))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        found.append((loss.item(), gradients, dict(trainer._metrics["train"])))
    (ours, our_gradients, our_figures), (theirs, their_gradients, their_figures) = found
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert our_gradients.norm() > 0.01
    torch.testing.assert_close(our_gradients, their_gradients, atol=1e-6, rtol=1e-4)
    assert our_figures.keys() == their_figures.keys()
    for name, values in their_figures.items():
        assert our_figures[name] == pytest.approx(values, abs=1e-4), name


@pytest.mark.parametrize("name", [*dpo_checks.AT_ZERO_MARGIN])
def test_what_is_expected_at_zero_margin_is_the_papers_value_there(name: str) -> None:
    same = [-torch.rand(n, dtype=torch.float64) for n in (3, 5, 2, 4)]
    for beta in (0.1, 0.5):
        expected = paper_loss(name, same, same, beta)
        assert dpo_checks.AT_ZERO_MARGIN[name](beta, EPSILON) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ the start


STARTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"bf16": True},
    "sigmoid + 0.2 sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2], "use_peft": True},
    "ipo": {"loss_type": "ipo", "precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("name", STARTS)
def test_a_right_start_is_checked_in_one_line(
    recipe: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = prepared(recipe(**STARTS[name]))
    trainer.check_start(trainer.model, first_batch(trainer))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "first batch" in line]
    assert f"({name}) as it must be, margins 0" in line
    assert "one end of turn for each answer, dropout off" in line
    assert not trainer._metrics["train"]


def test_any_loss_is_checked_at_its_own_value(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = prepared(recipe())
    batch = first_batch(trainer)
    trainer.label_smoothing = EPSILON
    for name in dpo_checks.LOSS_TYPES:
        trainer.loss_types, trainer.loss_weights = [name], [0.5]
        trainer.check_start(trainer.model, batch)
    assert capsys.readouterr().out.count("as it must be, margins 0") == len(dpo_checks.LOSS_TYPES)
    trainer.loss_types, trainer.ld_alpha, trainer.use_weighting = ["hinge"], 0.5, True
    trainer.f_divergence_type = "js_divergence"
    trainer.check_start(trainer.model, batch)
    assert trainer.use_weighting is True  # left out of the check, and put back


def test_functional_dropout_is_off_and_the_published_model_keeps_its_own(recipe: Any, start: Path) -> None:
    trainer = prepared(recipe())
    assert read_json(start / "config.json")["attention_dropout"] == 0.1
    for model in (trainer.model, trainer.ref_model):
        assert dpo_checks.dropout_left(model) == []
    assert trainer.model.config.attention_dropout == 0.1


def with_wrong_reference(trainer: Any) -> None:
    shake(trainer.ref_model)


def with_dropout(trainer: Any) -> None:
    trainer.model.model.layers[0].attention.attention_dropout.p = 0.3


def with_hidden_dropout(trainer: Any) -> None:
    """By a hook, where no look at the modules finds it."""
    trainer.model.model.register_forward_hook(
        lambda module, args, out: setattr(
            out, "last_hidden_state", torch.nn.functional.dropout(out.last_hidden_state, 0.1, module.training)
        )
    )


def with_another_loss(trainer: Any) -> None:
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * 1.01


WRONG_STARTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "reference": (with_wrong_reference, r"chosen answers are .* nats from the reference.*must be 0"),
    "dropout": (with_dropout, r"dropout is on in model\.layers\.0\.attention\.attention_dropout \(0\.3\)"),
    "hidden dropout": (with_hidden_dropout, "something is still dropped in training mode"),
    "loss": (with_another_loss, r"the loss \(sigmoid\) is 0\.70.*, and it must be 0\.693147"),
}


@pytest.mark.parametrize("name", WRONG_STARTS)
def test_a_wrong_start_is_refused_with_its_cause(recipe: Any, name: str) -> None:
    trainer = prepared(recipe())
    spoil, message = WRONG_STARTS[name]
    spoil(trainer)
    with pytest.raises(TrueupError, match=message):
        trainer.check_start(trainer.model, first_batch(trainer))


def test_ends_and_prompts_are_counted() -> None:
    end, ids = 9, torch.tensor([[1, 2, 3, 9], [1, 2, 9, 0]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    answer = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])

    def check(max_length: int | None = None, **changed: torch.Tensor) -> float:
        batch = {"input_ids": ids, "attention_mask": real, "completion_mask": answer} | changed
        return dpo_checks.check_tokens(batch, end, max_length)

    assert check() == pytest.approx(4 / 7)
    with pytest.raises(TrueupError, match=r"1 of 2 answers end with 2 end of turn.*added once more"):
        check(input_ids=torch.tensor([[1, 2, 9, 9], [1, 2, 9, 0]]))
    without = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 0]])
    with pytest.raises(TrueupError, match=r"1 of 2 answers end with no end of turn.*chat_template\.jinja"):
        check(input_ids=without)
    assert check(max_length=4, input_ids=without)  # it was cut
    with pytest.raises(TrueupError, match="max_length 4 cuts the end off every answer"):
        check(max_length=4, input_ids=without[:1], attention_mask=real[:1], completion_mask=answer[:1])
    with pytest.raises(TrueupError, match="every token is, prompts included, trained"):
        check(completion_mask=real)
    with pytest.raises(TrueupError, match="no token of an answer is trained"):
        check(completion_mask=0 * real)


# ----------------------------------------------------------------------------------------------- the recipe


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "loss_weights": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1]}, "1 weights for 2 losses"),
    "loss_type": ({"loss_type": "sigmiod"}, "there is no loss sigmiod; the losses are sigmoid"),
    "label_smoothing": ({"label_smoothing": 0.1}, "is ignored by sigmoid.*exo_pair, robust"),
    "label_smoothing 2": ({"loss_type": "robust", "label_smoothing": 0.5}, "from 0 to below 0.5"),
    "loss_type exo": ({"loss_type": "exo_pair"}, "needs a label_smoothing above 0"),
    "f_divergence_type": (
        {"loss_type": ["hinge", "aot"], "f_divergence_type": "forward_kl"}, "no meaning for aot",
    ),
    "f_alpha_divergence_coef": ({"f_alpha_divergence_coef": 0.3}, "alpha_divergence alone"),
    "discopop_tau": ({"discopop_tau": 0.1}, "ignored by sigmoid"),
    "beta": ({"loss_type": "sft", "beta": 0.2}, "ignored by sft"),
    "beta 2": ({"beta": 0}, "above 0"),
    "ld_alpha": ({"ld_alpha": 2}, "from 0 to 1"),
    "use_weighting": ({"use_weighting": True, "loss_type": "aot"}, "aot sorts the rows"),
    "sync_ref_model": ({"sync_ref_model": True, "use_peft": True}, "excludes use_peft"),
    "sync_ref_model 2": ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "excludes precompute"),
    "ref_model_sync_steps": ({"ref_model_sync_steps": 4}, "sync_ref_model: true alone"),
    "precompute_ref_batch_size": ({"precompute_ref_batch_size": 4}, "precompute_ref_log_probs: true alone"),
    "padding_free": ({"padding_free": True}, "ignored by TRL's DPO"),
    "truncation_mode": ({"truncation_mode": "keep_end"}, "retired by TRL"),
    "disable_dropout": ({"disable_dropout": False}, "must be true"),
    "lora_dropout": ({"use_peft": True, "lora_dropout": 0.1}, "turned off with all other dropout"),
    "metric_for_best_model": ({"metric_for_best_model": "eval_score", "scorers": "unset"}, "name scorers"),
    "scorers": ({"eval_strategy": "no", "eval_steps": "unset"}, "and eval_strategy is no"),
    "save_steps": ({"keep_checkpoints": "evaluated"}, "and keep_checkpoints: evaluated contradict"),
    "keep_checkpoints": (
        {"keep_checkpoints": "evaluated", "eval_strategy": "no"}, "and eval_strategy: no contradict",
    ),
    "max_prompt_length": ({"max_prompt_length": 32}, "max_length, with truncation_mode"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_keys_that_are_ignored_or_contradict_each_other_are_errors(recipe: Any, name: str) -> None:
    keys, message = WRONG[name]
    with pytest.raises(RecipeError, match=rf"out\.yaml:\d+: {name.split()[0]}:? .*{message}"):
        recipe(**keys)


def test_an_old_recipe_is_read(recipe: Any) -> None:
    values = recipe(rpo_alpha=0.2).values
    assert (values["loss_type"], values["loss_weights"]) == (["sigmoid", "sft"], [1.0, 0.2])


# -------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("keys", [{}, {"use_peft": True, "lora_r": 8}], ids=["full", "lora"])
def test_it_learns_and_publishes_what_it_was_measured_by(
    recipe: Any, start: Path, keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(recipe(max_steps=20, eval_steps=10, save_steps=10, **keys))
    opened = open_directory(out, "causal-lm")
    record = opened.record
    assert record["parents"]["model_name_or_path"]["identity"] == identity(start)
    assert {"eval_score", "eval_kl", "eval_kl_stderr", "eval_repetition", "eval_eos_rate"} <= set(
        record["metrics"]
    )
    assert record["metrics"]["eval_rewards/accuracies"] > 0.9
    assert (out / "adapter").exists() == bool(keys)
    points = [json.loads(line) for line in (out / "frontier.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [0, 10, 20]
    assert points[0]["kl"] == 0 < points[-1]["kl"]
    log = [json.loads(line) for line in Path(f"{out}.work/log.jsonl").read_text().splitlines()]
    assert sum("eval_score" in line for line in log) == 3
    assert all(line["rewards/margins"] == 0 for line in log if line["step"] == 1 and "loss" in line)
    said = capsys.readouterr().out
    assert f"reference: {start} ({identity(start)[:12]})" in said
    assert said.count("first batch checked") == 1


def test_the_models_of_all_evaluations_may_be_kept(recipe: Any) -> None:
    """One by one a model directory, without what only a resume needs."""
    out = run(recipe(max_steps=4, keep_checkpoints="evaluated", save_steps="unset"))
    kept = sorted(Path(f"{out}.work").glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-2", "checkpoint-4"]
    last, published = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (kept[-1], out))
    assert all(torch.equal(tensor, published[name]) for name, tensor in last.items())
    assert not [path.name for path in kept[-1].iterdir() if "optimizer" in path.name or "state" in path.name]


def test_the_best_by_validation_score_is_published(recipe: Any) -> None:
    """By a score that falls from one evaluation to the next, that is the first checkpoint."""
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_score"}
    out = run(recipe(scorers=["offline_models:wanes"], **constant, **best))
    first = run(recipe(name="first", max_steps=2, **constant))
    assert identity(out) == identity(first)


def test_another_reference_is_a_parent_and_margins_need_not_be_zero(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = offline_models.write_start(tmp_path / "other", initializer_range=0.2)
    out = run(recipe(ref_model_name_or_path=str(other), max_steps=2))
    parents = open_directory(out).record["parents"]
    assert parents["ref_model_name_or_path"]["identity"] == identity(other)
    assert "the reference is another model" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UsageError, match="another vocabulary than the model"):
        run(recipe(ref_model_name_or_path=str(other), name="two"))


def test_a_falling_chosen_side_is_explained_once(capsys: pytest.CaptureFixture[str]) -> None:
    def callback(*before: dict[str, Any]) -> FallingChosen:
        made = FallingChosen()
        made.on_train_begin(None, TrainerState(log_history=[*before]), None)  # type: ignore[arg-type]
        return made

    fine = {"rewards/chosen": 0.3, "rewards/rejected": -0.2}
    only_noise = {"rewards/chosen": -0.01, "rewards/rejected": -0.2}
    fallen = {"rewards/chosen": -0.4, "rewards/rejected": -0.9}
    fresh = callback(fine)
    for line in (fine, only_noise, fallen, fallen):
        fresh.on_log(None, TrainerState(global_step=7), None, logs=line)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert said.count("step 7: the chosen answers are now less likely than under the reference") == 1
    assert "(rewards/chosen -0.40), the rejected ones even less (-0.90)" in said
    resumed = callback(fine, fallen)
    resumed.on_log(None, TrainerState(), None, logs=fallen)  # type: ignore[arg-type]
    assert not capsys.readouterr().out


def test_pairs_that_teach_nothing_are_counted_and_rows_hold_to_the_context(recipe: Any) -> None:
    long = "and so on " * 40
    alike = [
        row | {side: [{"role": "assistant", "content": long + side}] for side in ("chosen", "rejected")}
        for row in PAIRS[:9]
    ]
    trainer = prepared(recipe([*PAIRS[9:], *alike], validation_split_size=0.5))
    assert trainer.args.max_length == 64  # the model's context
    lines = [line for report in trainer.reports.values() for line in report.lines()]
    assert any("within max_length 64 an answer is cut away, or both are equal" in line for line in lines)
    with pytest.raises(UsageError, match="max_length: 128 is more than the model's 64 positions"):
        prepared(recipe(max_length=128), chosen_length=True)


# ------------------------------------------------------------------------------------------------- resuming


MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 4},
    "precomputed": {"precompute_ref_log_probs": True},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_died_goes_on_to_the_same_bits(
    recipe: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(recipe(name="whole", **MODES[mode]))
    step = OfflineTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise RuntimeError("power cut")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OfflineTrainer, "training_step", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            run(recipe(name="broken", **MODES[mode]))
    broken = run(recipe(name="broken", **MODES[mode]))
    assert identity(broken) == identity(whole)
    frontiers = [(out / "frontier.jsonl").read_text() for out in (whole, broken)]
    assert frontiers[0] == frontiers[1]


@pytest.mark.faults
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(recipe: Any) -> None:
    """kill -9 five times, each at a random moment of the half second after a checkpoint was begun."""
    begin = "import sys; from trueup.app.cli import main; main(['dpo', '--config', sys.argv[1]])"
    keys: dict[str, Any] = {"max_steps": 400, "save_steps": 5, "eval_steps": 50}
    whole, broken = run(recipe(name="whole", **keys)), recipe(name="broken", **keys)
    command = [sys.executable, "-c", begin, str(broken.source)]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    output, moments = Path(broken.values["output_dir"]), random.Random(0)
    for _ in range(5):
        before = newest_number(output)
        child = subprocess.Popen(command, start_new_session=True, env=here)
        while child.poll() is None and newest_number(output) <= before:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.5))
        assert child.poll() is None, "it ended before it could be killed"
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert not output.exists()
    subprocess.run(command, check=True, env=here)
    assert identity(output) == identity(whole)


def newest_number(output: Path) -> int:
    """The step of the newest checkpoint, complete or not; 0 before the first."""
    names = [path.name for path in Path(f"{output}.work").glob("checkpoint-*")]
    return max([int(name.split("-")[1]) for name in names], default=0)
