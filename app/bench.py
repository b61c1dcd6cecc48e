"""`trueup bench`: every claim of speed comes from here, as a ratio against a peer in the same run.

Peers take turns, so that a busy machine slows all of them alike, and medians are compared. On a CPU what
counts is the CPU time of the process, on a GPU the wall time.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from trueup.recipes.errors import UsageError
from trueup.recipes.machine import accelerator, has_bf16

bench = typer.Typer(name="bench", help="Measure speed against a peer, both in one run.", no_args_is_help=True)

Rounds = Annotated[int, typer.Option(min=1, help="Turns of each; the median counts.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines: one JSON object with `ratio`.")]


@dataclass(frozen=True)
class Result:
    """Ours and a peer, in units of work per second; `ratio` above 1 means that we are faster."""

    benchmark: str
    against: str
    unit: str
    ours: float
    peer: float
    ratio: float
    device: str
    dtype: str
    settings: dict[str, Any]


def interleave(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, taking turns after one turn each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in track(range(rounds + 1), "Measuring"):
        for name, work in candidates.items():
            started = _clock()
            work()
            if number:
                seconds[name].append(_clock() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def report(result: Result, as_json: bool) -> None:
    """Print one result, for people or machines."""
    if as_json:
        print(json.dumps(asdict(result)))
        return
    table = Table("", result.unit, title=f"{result.benchmark} ({result.device}, {result.dtype})")
    table.add_row("trueup", f"{result.ours:,.0f}")
    table.add_row(result.against, f"{result.peer:,.0f}")
    table.add_section()
    table.add_row("ratio", f"{result.ratio:.2f}x")
    Console().print(table)


# ---------------------------------------------------------------- pretraining

# hidden_size, layers, heads, context, vocabulary, rows
SHAPES = {
    "lab": (192, 4, 6, 128, 1024, 64),
    "12M": (384, 6, 6, 256, 4096, 16),
    "124M": (768, 12, 12, 1024, 32768, 8),
}


@bench.command()
def pretrain(
    against: Annotated[str, typer.Option(help="The peer: llama (Transformers' LlamaForCausalLM).")] = "llama",
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "12M",
    rounds: Rounds = 10,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile both.")] = False,
    as_json: AsJson = False,
) -> None:
    """Training steps of our GPT as the pretraining loop takes them, against a peer of the same shape.

    Both: forward, backward, clipping, fused AdamW, bf16 autocast where the device has it, the same allocator
    settings and the same batch. Ours takes the chunked cross-entropy of the loop, the peer its own loss.
    """
    if against != "llama" or shape not in SHAPES:
        raise UsageError(f"bench pretrain: --against llama, --shape {' | '.join(SHAPES)}")
    import torch

    from trueup.base.device import keep_freed_memory

    keep_freed_memory()
    device = accelerator()
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    width, layers, heads, context, vocab, rows = SHAPES[shape]
    torch.manual_seed(0)
    ids = torch.randint(0, vocab, (rows, context + 1), device=device)
    steps = {
        "trueup": _train_step(*_ours(width, layers, heads, context, vocab, ids), device, dtype, compiled),
        against: _train_step(*_llama(width, layers, heads, context, vocab, ids), device, dtype, compiled),
    }
    seconds = interleave(steps, rounds)
    tokens = rows * context
    settings = {"shape": shape, "rounds": rounds, "compile": compiled, "threads": torch.get_num_threads()}
    ours, peer = tokens / seconds["trueup"], tokens / seconds[against]
    name = str(dtype).removeprefix("torch.")
    report(Result("pretrain", against, "tokens/s", ours, peer, ours / peer, device, name, settings), as_json)


@bench.command()
def ppo(
    against: Annotated[
        str, typer.Option(help="The peer: trl (its release 1.12.0, the last with PPO).")
    ] = "trl",
    rounds: Rounds = 5,
    learning: Annotated[
        bool, typer.Option("--learning", help="Compare what they learn, over seeds, not how fast they are.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Of --learning.")] = 5,
    picture: Annotated[Path, typer.Option(help="Where --learning draws its curves.")] = Path(
        "ppo-learning.png"
    ),
    environment: Annotated[
        Path, typer.Option(help="Where TRL's virtual environment is made and kept.")
    ] = Path("~/.cache/trueup/trl-1.12.0"),
    as_json: AsJson = False,
) -> None:
    """Rounds of our PPO against TRL 1.12's: rollout, scoring, and 4 epochs of updates.

    Both: the same model, prompts, reward model, batches and optimizer steps, on one CPU thread, in fp32 and
    bf16; ours also with the value head on the policy's trunk, which is another algorithm.
    """
    if against != "trl":
        raise UsageError("bench ppo: --against trl")
    from trueup.app import bench_ppo, bench_ppo_learning

    environment = environment.expanduser()
    if learning:
        figures, table = bench_ppo_learning.learning(environment, seeds, picture)
        found = json.dumps(figures)
    else:
        result, table = bench_ppo.speed(environment, rounds)
        found = json.dumps(asdict(result))
    if as_json:
        print(found)
    else:
        Console().print(table)


def _ours(
    width: int, layers: int, heads: int, context: int, vocab: int, ids: Any
) -> tuple[Any, Callable[[], Any]]:
    from trueup.base import GPTConfig, GPTForCausalLM
    from trueup.base.pretrain_loop import NextTokenLoss

    config = GPTConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=context,
    )  # fmt: skip
    module = NextTokenLoss(GPTForCausalLM(config)).to(ids.device)
    inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()
    positions = _positions(inputs)
    return module, lambda: module(inputs, positions, labels) / labels.numel()


def _llama(
    width: int, layers: int, heads: int, context: int, vocab: int, ids: Any
) -> tuple[Any, Callable[[], Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from trueup.base import GPTConfig

    same = GPTConfig(hidden_size=width, num_attention_heads=heads)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=context, intermediate_size=same.intermediate_size, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip
    module = LlamaForCausalLM(config).to(ids.device)
    inputs = ids[:, :-1].contiguous()
    return module, lambda: module(input_ids=inputs, labels=inputs).loss


def _positions(ids: Any) -> Any:
    import torch

    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def _train_step(
    module: Any, loss: Callable[[], Any], device: str, dtype: Any, compiled: bool
) -> Callable[[], None]:
    import torch

    if compiled:
        module.compile(dynamic=False)
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
