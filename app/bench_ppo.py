"""`trueup bench ppo`: PPO against TRL 1.12.0, the last release with a trainer for it.

TRL gets a virtual environment of its own, which borrows all other packages from ours. Each contestant is a
process of its own (`bench_ppo_worker.py`): same model, prompts, reward model, batch and optimizer steps.
"""

import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from trueup.app.bench import Result
from trueup.recipes.errors import TrueupError
from trueup.recipes.machine import accelerator, has_bf16

TRL = "trl==1.12.0"
WORKER = Path(__file__).with_name("bench_ppo_worker.py")


@dataclass(frozen=True)
class Contestant:
    """A trainer, and how it is set."""

    name: str
    trainer: str  # trueup | trl
    bf16: bool = False
    share_trunk: bool = False

    def settings(self, shared: dict[str, Any]) -> dict[str, Any]:
        """Its PPOConfig: what both trainers call by the same name, and what only one of them has."""
        own = (
            {"share_trunk": self.share_trunk}
            if self.trainer == "trueup"
            else {"stop_token": "eos", "num_sample_generations": 0, "gradient_checkpointing": False}
        )
        return {**shared, "bf16": self.bf16, **own}


# ------------------------------------------------------------------------------------------ TRL's environment


def peer_python(environment: Path) -> Path:
    """The Python of a virtual environment with TRL 1.12.0, made if it is not there.

    Raises:
        TrueupError: TRL could not be installed.
    """
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    borrowed = environment / "borrows-from"
    ours = sysconfig.get_path("purelib")
    if borrowed.exists() and borrowed.read_text() == ours:
        return python
    print(f"installing {TRL} in {environment}", file=sys.stderr, flush=True)
    venv.create(environment, clear=True)
    install = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", TRL]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), *install],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise TrueupError(f"{TRL} could not be installed in {environment}: {done.stderr.strip()}")
    site = sysconfig.get_path("purelib", vars={"base": str(environment)})
    (Path(site) / "borrowed.pth").write_text(ours)  # comes after its own packages: its TRL is the one found
    borrowed.write_text(ours)
    return python


# ------------------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class Shape:
    """Sizes of policy and reward model, and how long completions are in the mean."""

    width: int
    layers: int
    vocab: int
    mean_length: float


def write_models(folder: Path, shape: Shape) -> dict[str, Any]:
    """A policy and a reward model with random weights, and prompts; returns where they are."""
    import torch

    from trueup.base import GPTConfig, GPTForCausalLM, GPTForSequenceClassification
    from trueup.base.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a b c"], vocab_size=279)  # bytes alone: a prompt's length is its text's
    config: dict[str, Any] = {
        "vocab_size": shape.vocab, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": 4, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    policy = GPTForCausalLM(GPTConfig(**config))
    end_after(policy, shape.mean_length)
    reward = GPTForSequenceClassification(GPTConfig(**config, num_labels=1))
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    chance = random.Random(0)
    prompts = ["".join(chance.choices("abcdefgh ", k=chance.randint(16, 31))) for _ in range(512)]
    return {"policy": str(folder / "policy"), "reward": str(folder / "reward"), "prompts": prompts}


def end_after(policy: Any, mean_length: float) -> None:
    """Give eos the same probability everywhere: lengths are then spread as a chat model's are.

    One channel of the residual stream holds a constant that no block writes to, and eos alone reads it.
    """
    import torch

    vocab, eos = policy.config.vocab_size, policy.config.eos_token_id
    with torch.no_grad():
        policy.model.embed_tokens.weight[:, 0] = policy.model.embed_tokens.weight.std()
        for layer in policy.model.layers:
            layer.attention.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        constant = policy.model(torch.arange(vocab)[None, :128]).last_hidden_state[..., 0].mean()
        policy.lm_head.weight[:, 0] = 0
        policy.lm_head.weight[eos, 0] = math.log((vocab - 1) / (mean_length - 1)) / constant


# ---------------------------------------------------------------------------------------------- the processes


@contextlib.contextmanager
def started(
    contestant: Contestant, spec: dict[str, Any], environment: Path, folder: Path
) -> Iterator["Process"]:
    """A contestant's process, ended with the block."""
    path = folder / f"{contestant.name}.json"
    path.write_text(json.dumps({**spec, "trainer": contestant.trainer}), encoding="utf-8")
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if contestant.bf16:
        settings["ACCELERATE_MIXED_PRECISION"] = "bf16"  # TRL's own Accelerator reads it here alone
    python = peer_python(environment) if contestant.trainer == "trl" else Path(sys.executable)
    with (folder / f"{contestant.name}.log").open("w+", encoding="utf-8") as log:
        # -P: this folder's modules must not take the place of Python's own.
        child = subprocess.Popen(
            [str(python), "-P", str(WORKER), str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | settings,
        )  # fmt: skip
        try:
            yield Process(contestant.name, child, log)
        finally:
            child.kill()
            child.wait()


@dataclass(frozen=True)
class Process:
    """A running contestant."""

    name: str
    child: "subprocess.Popen[str]"
    log: Any

    def answer(self) -> Any:
        """Its next answer.

        Raises:
            TrueupError: it has died.
        """
        assert self.child.stdout is not None
        if line := self.child.stdout.readline():
            return json.loads(line)
        self.log.seek(0)
        raise TrueupError(f"{self.name} ended: {self.log.read()[-3000:]}")

    def turn(self) -> Any:
        """Let it make one update; returns what it took."""
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, and `answer` says of what
            self.child.stdin.write("\n")
            self.child.stdin.flush()
        return self.answer()


# ------------------------------------------------------------------------------------------------------ speed

ROWS, RESPONSE = 64, 48
PHASES = ("sample", "score", "measure", "update")  # seconds of each; measure: log-probabilities and values


def speed(environment: Path, rounds: int) -> tuple[Result, Table]:
    """Rounds of each contestant in turn: CPU time (on a GPU wall time) and peak memory."""
    device = accelerator()
    bf16 = has_bf16(device)
    contestants = [Contestant("trueup fp32", "trueup"), Contestant("trl fp32", "trl")]
    if bf16:
        contestants += [
            Contestant("trueup bf16", "trueup", bf16=True),
            Contestant("trl bf16", "trl", bf16=True),
        ]
    contestants.append(Contestant("trueup, shared trunk", "trueup", bf16=bf16, share_trunk=True))
    shape = Shape(width=256, layers=4, vocab=4096, mean_length=RESPONSE / 2)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        models = write_models(folder, shape)
        shared = {
            "output_dir": str(folder / "out"), "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": ROWS // 16, "num_ppo_epochs": 4, "num_mini_batches": 1,
            "total_episodes": ROWS * (rounds + 2), "response_length": RESPONSE, "temperature": 1.0,
            "missing_eos_penalty": 1.0, "learning_rate": 1e-6, "use_cpu": device == "cpu",
            "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 0,
        }  # fmt: skip
        processes = {}
        for one in contestants:
            spec = {**models, "settings": one.settings(shared), "paced": True, "seeds": []}
            processes[one.name] = stack.enter_context(started(one, spec, environment, folder))
        before = {name: process.answer()["memory"] for name, process in processes.items()}
        seconds: dict[str, list[float]] = {name: [] for name in processes}
        phases: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
        memory = {}
        for number in track(range(rounds + 1), "Measuring", console=Console(stderr=True)):
            for name, process in processes.items():
                found = process.turn()
                memory[name] = found["memory"] - before[name]
                if number:  # the first warms up
                    seconds[name].append(found["seconds"])
                    phases[name].append(found["phases"])
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return _verdict(
        medians,
        memory,
        {name: _medians(found) for name, found in phases.items()},
        device,
        {"rounds": rounds, "rows": ROWS, "response_length": RESPONSE, **asdict(shape)},
    )


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {phase: statistics.median(one[phase] for one in rounds) for phase in rounds[0]}


def _verdict(
    seconds: dict[str, float],
    memory: dict[str, int],
    phases: dict[str, dict[str, float]],
    device: str,
    settings: dict[str, Any],
) -> tuple[Result, Table]:
    """The result, which compares like with like, and a table of all, with the phases of ours."""
    title = f"ppo: {ROWS} completions of up to {RESPONSE} tokens ({device})"
    table = Table("", "s per round", "MB", *PHASES, title=title)
    for name in seconds:
        parts = [f"{phases[name][phase]:.2f}" for phase in PHASES if phases[name]]
        table.add_row(name, f"{seconds[name]:.2f}", f"{memory[name] / 2**20:,.0f}", *parts)
    table.add_section()
    dtype = "bf16" if "trl bf16" in seconds else "fp32"
    pairs = {f"{p} against TRL's {p}": (f"trueup {p}", f"trl {p}") for p in ("fp32", dtype)}
    pairs["shared trunk against TRL's fp32"] = ("trueup, shared trunk", "trl fp32")
    ratios = {}
    for name, (one, other) in pairs.items():
        ratios[name] = {"speed": seconds[other] / seconds[one], "memory": memory[one] / memory[other]}
        table.add_row(name, f"{ratios[name]['speed']:.2f}x", f"{ratios[name]['memory']:.2f}x")
    ours, peer = ROWS / seconds[f"trueup {dtype}"], ROWS / seconds[f"trl {dtype}"]
    found = {"ratios": ratios, "seconds": seconds, "memory": memory, "phases": phases}
    return Result(
        "ppo", TRL, "completions/s", ours, peer, ours / peer, device, dtype, settings | found
    ), table
