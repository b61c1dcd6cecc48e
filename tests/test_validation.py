"""Validation along the way: what is measured on frozen prompts, and how it joins a Trainer's evaluations."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import eval_models
import pytest
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from trueup.eval.frontier import FRONTIER, FrontierCallback
from trueup.eval.guard_callback import GuardCallback
from trueup.eval.kl import sampled_kl
from trueup.eval.sampler import SamplingSettings, sample
from trueup.eval.scorers import FunctionScorer, RewardModelScorer
from trueup.eval.validation import Validation, ValidationCallback, frozen_prompts

ROWS = [{"prompt": [{"role": "user", "content": "ab" * n}], "wanted": n} for n in range(1, 8)]


def near(prompts: Any, completions: Any, wanted: list[int], **columns: Any) -> list[float]:
    """A score that needs a column of the data set: -|words - wanted|."""
    words = [len(one[0]["content"].split()) for one in completions]
    return [-abs(count - n) + 0.0 for count, n in zip(words, wanted, strict=True)]


def length(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """No verdict on the shortest prompt."""
    texts = [(p[0]["content"], c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]
    return [None if prompt == "ab" else float(len(text)) for prompt, text in texts]


def validation(rows: Any = ROWS, **changes: Any) -> Validation:
    scorers = [FunctionScorer(near, "near"), FunctionScorer(length, "length")]
    return Validation(rows, eval_models.tokenizer(), **{"scorers": scorers, "max_new_tokens": 12} | changes)


def test_figures_are_those_of_the_samples() -> None:
    policy, reference = eval_models.policy(), eval_models.policy(seed=1)
    figures, table = validation(seed=3)(policy, reference)
    settings = SamplingSettings(max_new_tokens=12, seed=3)
    prompts = [row["prompt"] for row in ROWS]
    kl, samples = sampled_kl(policy, reference, eval_models.tokenizer(), prompts, settings)
    assert [entry["completion"] for entry in table] == [one.text for one in samples]
    assert [entry["prompt"] for entry in table] == prompts
    said = near(prompts, [[{"content": one.text}] for one in samples], [row["wanted"] for row in ROWS])
    assert [entry["scorers/near"] for entry in table] == said
    assert figures["score"] == figures["scorers/near"] == pytest.approx(sum(said) / len(said))
    heard = [entry["scorers/length"] for entry in table[1:]]
    assert math.isnan(table[0]["scorers/length"])
    assert figures["scorers/length"] == pytest.approx(sum(heard) / len(heard))
    assert (figures["kl"], figures["kl_stderr"]) == (kl.per_sequence, kl.stderr)
    assert {"repetition", "eos_rate", "completions/mean_length", "completions/entropy"} <= set(figures)
    assert "entropy" not in figures  # under DPO's eval_entropy stands that of the data set's text


def test_it_is_the_same_each_time_and_zero_for_the_reference_itself() -> None:
    policy = eval_models.policy()
    once, again = validation()(policy, policy), validation()(policy, policy)
    assert once == again or str(once) == str(again)  # nan != nan
    assert once[0]["kl"] == 0
    assert validation(seed=1)(policy, policy)[1] != once[1]
    fewer = validation(ROWS[:3])(policy, policy)[1]
    assert [e["completion"] for e in fewer] == [e["completion"] for e in once[1][:3]]


def test_a_reward_model_reads_the_very_tokens() -> None:
    policy = eval_models.policy()
    scorer = RewardModelScorer(eval_models.reward_model(), eval_models.tokenizer(), "rm")
    _, table = validation(scorers=[scorer])(policy, policy)
    settings = SamplingSettings(max_new_tokens=12)
    samples = sample(policy, eval_models.tokenizer(), [row["prompt"] for row in ROWS], settings)
    assert [e["scorers/rm"] for e in table] == scorer.score_tokens([s.prompt_ids + s.ids for s in samples])


def test_frozen_prompts_differ_fit_and_stay() -> None:
    tokenizer = eval_models.tokenizer()
    texts = [f"n{i % 20} " + "long " * (30 if i % 20 > 15 else 0) for i in range(60)]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    chosen = frozen_prompts(Dataset.from_list(rows), 10, tokenizer, 128, 64)
    assert chosen == frozen_prompts(Dataset.from_list(rows), 10, tokenizer, 128, 64)
    assert len({json.dumps(row) for row in chosen}) == 10
    assert chosen != rows[:10]
    every = frozen_prompts(Dataset.from_list(rows), 100, tokenizer, 128, 64)
    assert len(every) == 16  # the four long ones leave no room
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert frozen_prompts(stream, 3, tokenizer, 128, 64) == rows[:3]


# --------------------------------------------------------------------------------------------- in a Trainer


def train(folder: Path, model: Any, reference: Any, **changes: Any) -> Trainer:
    """Teach the model to repeat `a`, validating by how often it says it."""

    def counts(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [one[0]["content"].count("a") / 12 for one in completions]

    tokenizer = eval_models.tokenizer()
    ids = tokenizer("a" * 20)["input_ids"]
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 32)
    settings: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "eval_strategy": "steps",
        "eval_steps": 3, "save_steps": 3, "logging_steps": 3, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "metric_for_best_model": "score", "load_best_model_at_end": True,
        "greater_is_better": True,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **settings | changes)
    guard = GuardCallback()
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows.select(range(4)), callbacks=[guard])
    scored = validation(scorers=[FunctionScorer(counts, "a")])
    trainer.add_callback(ValidationCallback(trainer, scored, reference))
    trainer.add_callback(FrontierCallback(folder))
    trainer.train()
    assert guard.guard.history.series("score")
    return trainer


def test_it_joins_the_evaluations_of_a_trainer(tmp_path: Path) -> None:
    trainer = train(tmp_path, eval_models.policy(), eval_models.policy())
    logged = {line["step"]: line for line in trainer.state.log_history if "eval_kl" in line}
    assert list(logged) == [0, 3, 6]
    assert logged[0]["eval_kl"] == 0 < logged[3]["eval_kl"]
    best = max((3, 6), key=lambda step: logged[step]["eval_score"])
    assert logged[best]["eval_score"] > logged[0]["eval_score"]
    assert trainer.state.best_metric == logged[best]["eval_score"]
    assert trainer.state.best_global_step == best
    points = [json.loads(line) for line in (tmp_path / FRONTIER).read_text().splitlines()]
    assert [p["step"] for p in points] == [0, 3, 6]
    assert points[1].keys() == {"step", "split", "kl", "kl_stderr", "score", "scorers/a"}
    for step in (0, 3, 6):
        table = [
            json.loads(r) for r in (tmp_path / f"completions/step-{step}.jsonl").read_text().splitlines()
        ]
        mean = sum(row["scorers/a"] for row in table) / len(ROWS)
        assert mean == pytest.approx(logged[step]["eval_score"])


def test_under_lora_the_reference_is_the_policy_without_its_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(eval_models.policy(), lora)
    trainer = train(tmp_path, model, None, max_steps=3)
    measured = [line["eval_kl"] for line in trainer.state.log_history if "eval_kl" in line]
    assert measured[0] == 0 < measured[1]
    whole, _ = validation(scorers=[])(trainer.model, eval_models.policy())
    assert whole["kl"] == pytest.approx(measured[1], abs=1e-4)


SHARED = """
import json, sys
sys.path[:0] = [{tests!r}]
from accelerate import PartialState
from test_validation import validation, eval_models

state = PartialState(cpu=True)
found = validation()(eval_models.policy(), eval_models.policy(seed=1))
open(sys.argv[1] + str(state.process_index), "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_share_the_rows_and_both_know_all(tmp_path: Path) -> None:
    script = tmp_path / "shared.py"
    script.write_text(SHARED.format(tests=str(Path(__file__).parent)))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29531",
    ]
    subprocess.run([*launch, str(script), str(tmp_path / "rank")], check=True, timeout=120)
    ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert str(ranks[0]) == str(ranks[1])
    figures, table = validation()(eval_models.policy(), eval_models.policy(seed=1))
    assert [e["completion"] for e in ranks[0][1]] == [e["completion"] for e in table]
    assert ranks[0][0]["kl"] == pytest.approx(figures["kl"], abs=1e-4)
