"""`trueup eval`: what models know and can do, by lm-eval."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from trueup.recipes.directory import check_writable
from trueup.recipes.errors import UsageError
from trueup.recipes.hub import local_directory, results_folder

if TYPE_CHECKING:
    from trueup.eval.results import Figure

Report = dict[str, Any]


Models = Annotated[
    list[str], typer.Argument(help="Model directories, adapters, or Hub ids (org/name).", metavar="MODEL...")
]
Tasks = Annotated[
    str | None,
    typer.Option(help="lm-eval's tasks, groups, tags, globs, or YAML files: a,b,c.yaml. lab: the lab's own."),
]
Shots = Annotated[
    int | None,
    typer.Option("--num_fewshot", min=0, help="Worked examples; default: the task's own number, else none."),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--apply_chat_template/--no-apply_chat_template",
        help="Ask through the chat template; default: as the task says, else not.",
    ),
]
System = Annotated[str | None, typer.Option("--system_instruction", help="Said before each question.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task, at most: its first ones.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--add_bos_token/--no-add_bos_token", help="Begin a text with bos; default: as in training."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the accelerator, if there is one.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: as stored.")
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch_size", min=1, help="Requests in one forward; default: 16 on a CPU, else 64."),
]
Seed = Annotated[
    int, typer.Option(help="Which worked examples are shown; what is sampled, where a task samples.")
]
Base = Annotated[str | None, typer.Option(help="Of an adapter: its base model; default: the one it names.")]
OutputDir = Annotated[
    Path | None, typer.Option("--output_dir", help="Write eval/*.json here, not into the model's directory.")
]
LogSamples = Annotated[
    bool, typer.Option("--log_samples", help="Keep every document, request and answer: eval/*.jsonl.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")]


def evaluate(
    models: Models,
    tasks: Tasks = None,
    num_fewshot: Shots = None,
    apply_chat_template: Chat = None,
    system_instruction: System = None,
    limit: Limit = None,
    add_bos_token: Bos = None,
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    seed: Seed = 1234,
    base: Base = None,
    output_dir: OutputDir = None,
    log_samples: LogSamples = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate models on tasks of lm-eval.

    Scores with standard errors go to eval/*.json in the model's directory, which stays the same model by its
    content hash, together with all that swings them: chat template, worked examples, truncation.
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names:
        raise UsageError(
            "name what to measure: --tasks lab, or arc_easy,piqa (tasks of lm-eval), or a YAML file"
        )
    if output_dir and len(models) > 1:
        raise UsageError("--output_dir: is for one model; its files are named by task alone")
    from trueup.eval.harness import EvalSettings, save_report
    from trueup.eval.harness import evaluate as evaluate_task
    from trueup.eval.harness_tasks import load_tasks

    settings = EvalSettings(
        num_fewshot, apply_chat_template, system_instruction, limit, seed, add_bos_token, batch_size
    )
    loaded = load_tasks(names)
    said = Console(stderr=True, highlight=False)
    reports: list[list[Report]] = []
    for name in models:
        model, tokenizer, identity = open_model(name, dtype, device, base)
        folder = output_dir or results_folder(name)
        check_writable(folder)
        reports.append([])
        for task in loaded:
            said.print(f"{name}: {task.name}, {task.documents(limit):,} documents")
            report = evaluate_task(model, tokenizer, task, settings, progress=True)
            report |= {"model": name, "identity": identity}
            report["file"] = str(save_report(report, folder, log_samples))
            del report["samples"]
            reports[-1].append(report)
    print(json.dumps(reports, indent=2)) if as_json else show(models, reports)


def open_model(name: str, dtype: str, device: str | None, base: str | None) -> tuple[Any, Any, str]:
    """A language model ready to be asked, its tokenizer, and its identity.

    Raises:
        UsageError: there is no such model, or it is of another kind.
        TrueupError: it is damaged.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from trueup.base.adapters import merge_directory
    from trueup.eval.loading import load_policy
    from trueup.recipes.directory import identity
    from trueup.recipes.machine import accelerator

    disable_progress_bar()  # of reading weights; ours stays
    path = Path(local_directory(name))
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        model, tokenizer, _ = merge_directory(path, base)
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    else:
        if base:
            raise UsageError(f"--base: {name} is no adapter; leave it out")
        model, tokenizer = load_policy(path, None if dtype == "auto" else getattr(torch, dtype))
    try:
        return model.eval().to(device or accelerator()), tokenizer, identity(path)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error


# --------------------------------------------------------------------------------------------------- shown


def show(models: list[str], reports: list[list[Report]]) -> None:
    """The scores as a table, a column for each model; then what one must know to read them."""
    from trueup.eval.results import figures

    console = Console()
    short = [Path(name).name for name in models]
    names = short if len(set(short)) == len(short) else models
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("task", "metric"):
        table.add_column(title, overflow="fold")
    for name in names:
        table.add_column(name if len(names) > 1 else "score", justify="right", no_wrap=True)
    by_task = {task: report for report in reports[0] for task in report["results"]}
    columns = [[figure for report in own for figure in figures(report)] for own in reports]
    shown = None
    for row in zip(*columns, strict=True):
        task, better = row[0].task, {1: " ↑", -1: " ↓"}.get(row[0].better, "")
        cells = [_cell(row[0], None), *(_cell(figure, row[0]) for figure in row[1:])]
        table.add_row("" if task == shown else _label(by_task[task], task), row[0].metric + better, *cells)
        shown = task
    if not console.is_terminal:  # a file is as wide as it needs to be
        console.width = max(console.width, console.measure(table).maximum)
    console.print(table)
    beside = f"; ▲ better, ▼ worse than {names[0]} beyond noise (95 %)" if len(names) > 1 else ""
    console.print(f"± standard error{beside}\n", style="dim")
    for report in reports[0]:
        console.print(_how(report), highlight=False, soft_wrap=True)
    for name, own in zip(names, reports, strict=True):
        for line in remarks(own):
            console.print(f"{name}: {line}" if len(names) > 1 else line, highlight=False, soft_wrap=True)
        files = " ".join(Path(report["file"]).name for report in own)
        console.print(f"{Path(own[0]['file']).parent}: {files}", style="dim", highlight=False, soft_wrap=True)


def _label(report: Report, task: str) -> str:
    """A group's name stands out, and its tasks below it are indented."""
    if task in report.get("groups", {}):
        return f"[bold]{task}[/bold]"
    return f"  {task}" if any(task in names for names in report["group_subtasks"].values()) else task


def _cell(figure: "Figure", other: "Figure | None") -> str:
    """A figure with its error, and whether it is another one than `other`, taken as independent."""

    def plain(value: float) -> str:
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"

    text = plain(figure.value) + ("" if figure.stderr is None else f" ± {plain(figure.stderr)}")
    if other is None or not figure.better or figure.stderr is None or other.stderr is None:
        return text
    difference = figure.better * (figure.value - other.value)
    noise = 1.96 * math.hypot(figure.stderr, other.stderr)
    mark = "[green]▲[/green]" if difference > noise else "[red]▼[/red]" if difference < -noise else " "
    return f"{text} {mark}"


def _how(report: Report) -> str:
    """How a task was asked."""
    from trueup.eval.results import figures

    shots = sorted(set(report["n-shot"].values()), key=str)
    chances = [figure.chance for figure in figures(report) if figure.chance is not None]
    told = [
        f"{figures(report)[0].documents:,} documents",
        f"{', '.join(map(str, shots))}-shot",
        "through the chat template" if report["settings"]["apply_chat_template"] else "without chat template",
        *([f"guessing gives {sum(chances) / len(chances):.3f}"] if chances else []),
    ]
    return f"{report['task']}: {', '.join(told)}"


def remarks(reports: list[Report]) -> list[str]:
    """What did not fit the model, one line each."""
    lines = []
    for report in reports:
        task, context = report["task"], f"{report['settings']['max_length']:,} tokens"
        lengths = report["lengths"]
        if lengths["truncated"]:
            lines.append(
                f"{task}: {lengths['truncated']:,} of {lengths['requests']:,} requests did not fit {context} "
                f"and lost their beginning ({lengths['tokens_lost']:,} tokens)"
            )
        if lengths["in_pieces"]:
            lines.append(
                f"{task}: {lengths['in_pieces']:,} texts are longer than {context}, scored in pieces"
            )
        if lengths["shortened"]:
            lines.append(f"{task}: {lengths['shortened']:,} replies are held to half of {context}")
    return lines
