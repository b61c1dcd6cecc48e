"""One contestant of `trueup bench ppo`, in a process of its own: a script, run with TRL 1.12 or with ours.

    python -P bench_ppo_worker.py SPEC.json

It builds the trainer that SPEC names. With `"paced": true` it makes one update for each line on stdin, and
answers each by a line of JSON on stdout: seconds, those of each phase where the trainer is ours, and peak
memory. Else it trains to the end once for each of `seeds`, and answers with the log.
"""

import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)


class Turns(TrainerCallback):
    """Waits for its turn before each update, and says afterwards what it took."""

    def __init__(self, answers: Any) -> None:
        self.answers = answers
        self.started = 0.0
        self.phases: dict[str, float] = defaultdict(float)  # seconds of this round

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = clock() - self.started
        phases = {**self.phases, "update": seconds - sum(self.phases.values())} if self.phases else {}
        answer = {"seconds": seconds, "memory": peak_memory(), "phases": phases}
        print(json.dumps(answer), file=self.answers, flush=True)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # no further turns, and nothing that a trainer does at its end is wanted
        self.phases.clear()
        self.started = clock()

    def watch(self, trainer: Any) -> None:
        """Time the phases of our trainer's rounds; what remains is the update."""
        trainer._complete = self._timed("sample", trainer._complete)
        trainer.rewards = self._timed("score", trainer.rewards)
        trainer._measure = self._timed("measure", trainer._measure)

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = clock()
            found = function(*args, **kwargs)
            self.phases[phase] += clock() - started
            return found

        return timed


def clock() -> float:
    """Seconds: of CPU time, all threads together; of wall time on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_memory() -> int:
    """Bytes at the highest so far: of GPU memory, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def policy(spec: dict[str, Any]) -> Any:
    """The policy to start from; it may bring its own code."""
    return AutoModelForCausalLM.from_pretrained(spec["policy"], trust_remote_code=True)


def judge(spec: dict[str, Any]) -> Any:
    """The reward model."""
    return AutoModelForSequenceClassification.from_pretrained(spec["reward"], trust_remote_code=True)


def tokenizer_of(spec: dict[str, Any], **options: Any) -> Any:
    """The policy's. Asked about its code, Transformers would read the answer from our pipe of turns."""
    return AutoTokenizer.from_pretrained(spec["policy"], trust_remote_code=True, **options)


def trueup_trainer(spec: dict[str, Any], callbacks: list[TrainerCallback]) -> Any:
    """Ours, with the allocator set as the stage sets it."""
    from trueup.base.device import keep_freed_memory
    from trueup.preference.ppo_config import PPOConfig
    from trueup.preference.ppo_trainer import PPOTrainer

    keep_freed_memory()
    return PPOTrainer(
        policy(spec),
        judge(spec),
        PPOConfig(**spec["settings"]),
        Dataset.from_dict({"prompt": spec["prompts"]}),
        processing_class=tokenizer_of(spec),
        callbacks=callbacks,
    )


def trl_trainer(spec: dict[str, Any], callbacks: list[TrainerCallback]) -> Any:
    """TRL's, as its own example builds it."""
    from trl.experimental import ppo

    tokenizer = tokenizer_of(spec, padding_side="left")
    set_seed(spec["settings"]["seed"])
    return ppo.PPOTrainer(
        args=ppo.PPOConfig(**spec["settings"]),
        processing_class=tokenizer,
        model=policy(spec),
        ref_model=policy(spec),
        reward_model=judge(spec),
        value_model=judge(spec),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(spec["prompts"])["input_ids"]}),
        callbacks=callbacks,
    )


def main() -> None:
    """See the top of this file."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the trainers print is no answer
    build = {"trueup": trueup_trainer, "trl": trl_trainer}[spec["trainer"]]
    if spec["paced"]:
        print(json.dumps({"memory": peak_memory()}), file=answers, flush=True)  # of the libraries alone
        turns = Turns(answers)
        trainer = build(spec, [turns])
        if spec["trainer"] == "trueup":
            turns.watch(trainer)
        trainer.train()
    for seed in spec["seeds"]:
        spec["settings"]["seed"] = seed
        trainer = build(spec, [])
        trainer.train()
        print(json.dumps(trainer.state.log_history), file=answers, flush=True)


if __name__ == "__main__":
    main()
