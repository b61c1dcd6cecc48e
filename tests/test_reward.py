"""The reward stage: its loss is what it says, the end is what is read, scores are calibrated, runs resume."""

import json
import math
import os
import random
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
import trl
from eval_models import policy as tiny_policy
from safetensors.torch import load_file
from sft_models import run, write_base

from trueup.eval.sampler import SamplingSettings, sample
from trueup.eval.scorers import RewardModelScorer
from trueup.recipes.directory import identity, open_directory, read_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import RecipeError

CHAT = [
    {
        "prompt": [{"role": "user", "content": f"what is {i} times {i}?"}],
        "chosen": [{"role": "assistant", "content": f"it is {i * i}" + " indeed" * (i % 4)}],
        "rejected": [{"role": "assistant", "content": f"it is {i}" + " indeed" * (i % 3)}],
    }
    for i in range(2, 62)
]
PLAIN = [{"prompt": f"{i} times {i}", "chosen": f" is {i * i}", "rejected": " is what"} for i in range(2, 42)]
USUAL: dict[str, Any] = {
    "stage": "reward",
    "calibration_prompts": 12,
    "test_split_size": 0.2,
    "learning_rate": 3e-3,
}


@pytest.fixture
def reward(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """make(rows, name, **keys): a reward recipe that starts from `base`."""

    def make(rows: list[dict[str, Any]] | None = None, name: str = "out", **keys: Any) -> Any:
        short = {} if keys.get("calibration_prompts") == 0 else {"max_new_tokens": 6}
        return recipe(rows or CHAT, name, **(USUAL | short | keys))

    return make


def prepared(recipe: Any) -> Any:
    """The stage's trainer with its data prepared, not yet trained."""
    origin = recipe.origin | {"max_length": "default"}
    return recipe.build().trainer(recipe.values, origin, Path(recipe.values["output_dir"]))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.3])
def test_the_loss_is_its_closed_form(reward: Any, margin: bool, center: float | None) -> None:
    rows = [row | ({"margin": place / 10} if margin else {}) for place, row in enumerate(CHAT)]
    trainer = prepared(reward(rows, center_rewards_coefficient=center))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), dict(batch)).item()

    with torch.no_grad():  # each side alone and without padding
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        scores = [
            trainer.model(ids[None, :length]).logits.item()
            for ids, length in zip(batch["input_ids"], lengths, strict=True)
        ]
    pairs = len(scores) // 2
    margins = batch["margin"].tolist() if margin else [0.0] * pairs
    assert margin == any(margins)
    expected = 0.0
    for chosen, rejected, by in zip(scores[:pairs], scores[pairs:], margins, strict=True):
        expected += math.log1p(math.exp(-(chosen - rejected - by))) + (center or 0) * (chosen + rejected) ** 2
    assert loss == pytest.approx(expected / pairs, abs=2e-6)


def test_dropout_is_off_also_where_attention_has_its_own(reward: Any, tmp_path: Path) -> None:
    base = str(write_base(tmp_path / "dropping", attention_dropout=0.5, embedding_dropout=0.5))
    for off in (True, False):
        trainer = prepared(reward(model_name_or_path=base, disable_dropout=off))
        batch = next(iter(trainer.get_train_dataloader()))
        losses = {trainer.compute_loss(trainer.model.train(), dict(batch)).item() for _ in range(3)}
        assert len(losses) == (1 if off else 3)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("rows", [CHAT, PLAIN], ids=["chat", "plain"])
def test_what_is_trained_is_what_the_scorer_reads_and_what_trl_makes(reward: Any, rows: Any) -> None:
    trainer = prepared(reward(rows, validation_split_size=0, test_split_size=0, exam=False))
    tokenizer = trainer.processing_class
    trained = list(trainer.train_dataset)
    assert len(trained) == len(rows)

    seen: list[list[int]] = []
    scorer = RewardModelScorer(trainer.model, tokenizer, "reward")
    scorer.score_tokens = lambda ids: seen.extend(ids) or [0.0] * len(ids)  # type: ignore[method-assign,func-returns-value]
    for side in ("chosen", "rejected"):
        seen.clear()
        scorer([row["prompt"] for row in rows], [row[side] for row in rows])
        assert seen == [row[f"{side}_ids"] for row in trained]
        assert all(
            ids[-1] == tokenizer.eos_token_id and ids.count(ids[-1]) == ids[:-1].count(ids[-1]) + 1
            for ids in seen
        )

    from datasets import Dataset

    trls = trl.RewardTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), tokenizer, trainer.args, "trl"
    )
    for name in ("chosen_ids", "rejected_ids"):
        assert list(trls[name]) == [row[name] for row in trained]


def test_pairs_that_teach_nothing_or_do_not_fit_are_counted(reward: Any) -> None:
    long = CHAT[0] | {"rejected": [{"role": "assistant", "content": "it is " * 40}]}
    rows = [*CHAT[:9], long]
    trainer = prepared(
        reward(rows, validation_split_size=0, test_split_size=0, exam=False, eval_strategy="no")
    )
    report = trainer.reports["train"]
    assert (report.pairs, report.too_long, report.max_length) == (9, 1, 64)
    assert "left out: 1 pairs longer than max_length 64" in "\n".join(report.lines())
    ids = [row["chosen_ids"] + row["rejected_ids"] for row in trainer.train_dataset]
    assert report.tokens == sum(map(len, ids))
    with pytest.raises(TrueupError, match="all 10 pairs have a side of over 8 tokens: raise max_length"):
        run(reward(rows, max_length=8, validation_split_size=0, test_split_size=0, exam=False))


def test_the_head_is_drawn_from_the_seed_on_the_start_models_trunk(reward: Any, base: Path) -> None:
    from trueup.preference.reward import open_with_head

    models = [open_with_head(reward(seed=seed).build()) for seed in (0, 0, 1)]
    heads = [model.score.weight for model in models]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(torch.cat(heads[1:]).detach().std()) * math.sqrt(32 + 1) == pytest.approx(1, abs=0.3)
    start = load_file(base / "model.safetensors")
    held = models[0].state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in start.items() if name != "lm_head.weight")


# ---------------------------------------------------------------- batches of like length


def test_batches_are_of_like_length_and_their_order_is_the_epochs() -> None:
    from trueup.base.trainer import LengthGroups

    lengths = [random.Random(place).randrange(10, 100) for place in range(403)]
    sampler = LengthGroups(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(403))
    batches = [first[start : start + 8] for start in range(0, 403, 8)]
    widest = [
        max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in batches[:-1]
    ]
    assert max(widest) < 20
    steps = [one - other for one, other in pairwise(max(lengths[row] for row in batch) for batch in batches)]
    assert min(steps) < -20 < 20 < max(steps), "batches do not run from long to short"
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


# ---------------------------------------------------------------- running


def test_a_run_writes_a_calibrated_directory_that_repeats_exactly(reward: Any, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    first, again = run(reward(name="first")), run(reward(name="again"))
    assert identity(first) == identity(again) == open_directory(first, "reward").identity
    record, config = read_json(first / "trueup.json"), read_json(first / "config.json")
    assert record["parents"]["model_name_or_path"]["identity"] == identity(base)
    assert [one["split"] for one in record["data"]] == ["train", "test"]
    assert len(config["auto_map"]) == 4
    assert config["reward_std"] == record["metrics"]["reward_std"] > 0
    model = AutoModelForSequenceClassification.from_pretrained(first)
    assert model.config.num_labels == 1

    # The scores of the start model's own answers to training prompts: mean 0, deviation 1.
    tokenizer = AutoTokenizer.from_pretrained(first)
    prompts = [CHAT[place]["prompt"] for place in range(60)]
    settings = SamplingSettings(max_new_tokens=6)
    start = AutoModelForCausalLM.from_pretrained(base)
    answers = sample(start, tokenizer, prompts, settings)
    scores = torch.tensor(
        RewardModelScorer.open(first).score_tokens([[*one.prompt_ids, *one.ids] for one in answers])
    )
    assert abs(float(scores.mean())) < 0.7
    assert 0.5 < float(scores.std()) < 2
    exam = read_json(first / "eval" / "exam.json")
    assert exam["identity"] == identity(first)
    assert exam["data"]["split"] == "test"
    assert (first / "eval" / "exam.png").stat().st_size > 20_000
    assert "accuracy" not in record["metrics"], "results of evaluations stay in eval/"


def test_it_learns_what_is_preferred(reward: Any) -> None:
    rows = [row | {"rejected": [{"role": "assistant", "content": f"no {i}"}]} for i, row in enumerate(CHAT)]
    directory = run(reward(rows, max_steps=30, center_rewards_coefficient=0.01, eval_strategy="epoch"))
    assert read_json(directory / "eval" / "exam.json")["accuracy"]["low"] > 0.5
    metrics = read_json(directory / "trueup.json")["metrics"]
    assert metrics["eval_accuracy"] == 1
    assert metrics["eval_margin"] > 1


def test_without_a_test_split_the_exam_is_on_validation_and_can_be_left_out(reward: Any) -> None:
    whole = run(reward(name="whole", test_split_size=0, validation_split_size=0.3))
    assert read_json(whole / "eval" / "exam.json")["data"]["split"] == "validation"
    none = run(reward(name="none", exam=False, calibration_prompts=0))
    assert not (none / "eval").exists()
    assert read_json(none / "config.json").get("reward_std") is None


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"]])
def test_lora_trains_and_saves_the_head_whole(reward: Any, targets: Any) -> None:
    keys = {"use_peft": True, "lora_r": 4, "lora_target_modules": targets}
    drawn = prepared(reward(**keys)).model.base_model.model.score.original_module.weight.detach().clone()
    directory = run(reward(**keys))
    merged = load_file(directory / "model.safetensors")
    adapter = load_file(directory / "adapter" / "adapter_model.safetensors")
    (head,) = [tensor for name, tensor in adapter.items() if "score" in name]
    assert torch.equal(head, merged["score.weight"])
    assert not torch.equal(head, drawn)
    assert any("lora_A" in name for name in adapter)
    assert open_directory(directory, "reward").record["metrics"]["reward_std"] > 0


# ---------------------------------------------------------------- the score


def write_foreign(path: Path, base: Path, **tokenizer_changes: Any) -> str:
    """A Llama with random weights and the base model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = tiny_policy("llama", vocab_size=len(tokenizer))
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.save_pretrained(path)
    for name, value in tokenizer_changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("family", ["ours", "llama"])
def test_a_score_is_the_same_alone_batched_padded_left_or_right(
    reward: Any, base: Path, tmp_path: Path, family: str
) -> None:
    start = str(base) if family == "ours" else write_foreign(tmp_path / "llama", base)
    directory = run(reward(model_name_or_path=start))
    prompts = [row["prompt"] for row in CHAT[:20]]
    answers = [row["chosen"] for row in CHAT[:20]]
    found = [
        RewardModelScorer.open(directory, padding_side=side, batch_size=size)(prompts, answers)
        for side, size in (("right", 1), ("right", 20), ("left", 20), ("left", 7))
    ]
    assert max(found[0]) - min(found[0]) > 0.05
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-4)
    # A foreign configuration has no place for it: the record keeps it, and the scorer applies it.
    scorer = RewardModelScorer.open(directory)
    metrics = read_json(directory / "trueup.json")["metrics"]
    assert metrics["reward_std"] > 0
    if family == "ours":
        assert scorer.calibration is None
        assert scorer.model.config.reward_mean == metrics["reward_mean"]
    else:
        assert scorer.calibration is not None
        assert scorer.calibration.mean == metrics["reward_mean"]


def test_padding_that_is_the_end_of_turn_is_refused_where_ids_are_compared(
    reward: Any, base: Path, tmp_path: Path
) -> None:
    foreign = write_foreign(tmp_path / "llama", base, pad_token="<|end|>")
    with pytest.raises(UsageError, match=r"pad token must not be its eos token, <\|end\|>"):
        run(reward(model_name_or_path=foreign))


def test_a_head_that_was_never_trained_is_refused(reward: Any, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from trueup.preference.reward import open_with_head

    with pytest.raises(UsageError, match="is a language model, and this needs a reward model"):
        RewardModelScorer.open(base)
    fresh = tmp_path / "fresh"
    open_with_head(reward().build()).save_pretrained(fresh)
    AutoTokenizer.from_pretrained(base).save_pretrained(fresh)
    with pytest.raises(TrueupError, match="its head may be random"):
        RewardModelScorer.open(fresh)
    trained = run(reward())
    weights = load_file(trained / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, trained / "model.safetensors", {"format": "pt"})
    (trained / "trueup.json").unlink()
    with pytest.raises(TrueupError, match=r"lack score.weight, which would be newly initialised"):
        RewardModelScorer.open(trained)


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    reward: Any, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trueup.base.interrupt import Interrupted
    from trueup.preference.reward_trainer import RewardTrainer

    keys = {"num_train_epochs": 2, "max_steps": -1, "train_sampling_strategy": order, "exam": False}
    whole = run(reward(name="whole", **keys))
    step, usual = [0], RewardTrainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        step[0] += 1
        if step[0] == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, *args, **kwargs)

    broken = reward(name="broken", **keys)
    monkeypatch.setattr(RewardTrainer, "training_step", stopping)
    with pytest.raises(Interrupted, match="after step 15 of"):
        run(broken)
    assert identity(run(broken)) == identity(whole)


@pytest.mark.faults
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(reward: Any) -> None:
    """kill -9 three times, each at a random moment of the half second after a checkpoint was begun."""
    start = "import sys; from trueup.app.cli import main; main(['reward', '--config', sys.argv[1]])"
    keys: dict[str, Any] = {"max_steps": 300, "save_steps": 5}
    whole, broken = run(reward(name="whole", **keys)), reward(name="broken", **keys)
    command = [sys.executable, "-c", start, str(broken.source)]
    output, moments = Path(broken.values["output_dir"]), random.Random(0)
    for _ in range(3):
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
    assert (output / "eval" / "exam.json").exists()


def newest_number(output: Path) -> int:
    """The step of the newest checkpoint, complete or not; 0 before the first."""
    names = [path.name for path in Path(f"{output}.work").glob("checkpoint-*")]
    return max([int(name.split("-")[1]) for name in names], default=0)


# ---------------------------------------------------------------- saying no


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "max_new_tokens": ({"calibration_prompts": 0, "max_new_tokens": 9}, "is for the calibration"),
    "train_sampling_strategy": (
        {"dataset_streaming": True, "train_sampling_strategy": "group_by_length"},
        "cannot group a stream",
    ),
    "lora_target_modules": ({"use_peft": True, "lora_target_modules": ["score"]}, "is trained whole"),
}


@pytest.mark.parametrize("key", WRONG)
def test_keys_that_contradict_each_other_are_named(reward: Any, key: str) -> None:
    keys, message = WRONG[key]
    with pytest.raises(RecipeError, match=rf"out\.yaml:\d+: {key} .*{message}"):
        reward(**keys)


def test_a_stream_trains_and_a_template_must_be_a_file(reward: Any, base: Path, tmp_path: Path) -> None:
    directory = run(reward(dataset_streaming=True, exam=False))
    assert read_json(directory / "trueup.json")["metrics"]["steps"] == 6
    template = tmp_path / "own.jinja"
    template.write_text((base / "chat_template.jinja").read_text() + "{# mine #}")
    other = run(reward(name="other", chat_template_path=str(template), exam=False))
    assert (other / "chat_template.jinja").read_text() == template.read_text()
    with pytest.raises(UsageError, match="another tokenizer's folder will not do"):
        run(reward(chat_template_path=str(base)))


# ---------------------------------------------------------------- real files


DATA = Path(os.environ.get("TRUEUP_DATA", Path(__file__).parents[2] / "shared" / "data")) / "preference"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA}: set TRUEUP_DATA to the test data")
@pytest.mark.parametrize(
    "name",
    ["hh_harmless_dev.jsonl.gz", "llamafactory_dpo_en_demo.jsonl", "rasbt_instruction_with_preference.jsonl"],
)
def test_real_files_train_and_are_examined(reward: Any, tmp_path: Path, name: str) -> None:
    model = str(write_base(tmp_path / "wide", max_position_embeddings=1024))
    keys = {"dataset_name": str(DATA / name), "skip_bad_rows": True, "test_split_size": 0.05}
    directory = run(reward(max_steps=3, model_name_or_path=model, **keys))
    exam = read_json(directory / "eval" / "exam.json")
    assert exam["pairs"] > 10
    assert exam["gold"] is None
    assert json.loads(json.dumps(exam, allow_nan=False)) == exam
