"""`trueup lab score` and `trueup lab learned`: what a model of the lab is truly worth, by the known truth."""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from trueup.recipes.lab import datasets, gold, tasks, text

Directory = Annotated[Path, typer.Argument(help="A model directory of the lab.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")]

MAX_NEW_TOKENS = 96  # the longest true answer of the lab has about half of that


def score(
    directory: Directory,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts, all families alike.")] = 840,
    temperature: Annotated[
        list[float] | None, typer.Option(help="0 is greedy, 1 samples as the model has learned; repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="validation for choices, test for verdicts.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="Exchanges to print.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Let a chat model answer the lab's held-out prompts, and mark every answer by the gold scorer."""
    from trueup.eval.loading import load_policy

    rows = list(itertools.islice(datasets.rows("lab/prompts", split), prompts))
    model, tokenizer = load_policy(directory)
    results = {}
    for heat in temperature or [0.0, 1.0]:
        answers = _answer(model, tokenizer, rows, heat, seed)
        results[f"{heat:g}"] = report = _marks(rows, answers)
        if as_json:
            continue
        for row, (answer, _), value in list(zip(rows, answers, report["scores"], strict=True))[:show]:
            _show(row, answer, value)
        _print(report, f"{directory}, {split} prompts, " + ("greedy" if heat == 0 else f"T = {heat:g}"))
    if as_json:
        print(json.dumps(results))


def _answer(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], heat: float, seed: int
) -> list[tuple[str, bool]]:
    """(text, ended by itself) for every row."""
    from trueup.eval.sampler import SamplingSettings, sample

    settings = SamplingSettings(max_new_tokens=MAX_NEW_TOKENS, temperature=heat, seed=seed)
    samples = sample(model, tokenizer, [row["prompt"] for row in rows], settings, progress=True)
    return [(made.text, made.ended) for made in samples]


def _marks(rows: list[dict[str, Any]], answers: list[tuple[str, bool]]) -> dict[str, Any]:
    """Gold's parts by family, with a 95 % interval of the share of correct answers."""
    from trueup.eval.statistics import wilson_interval

    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    arguments: dict[str, Any] = {
        "prompts": [row["prompt"] for row in rows],
        "completions": [answer for answer, _ in answers],
        "ended": [ended for _, ended in answers],
        **columns,
    }
    scores, parts = gold.gold(**arguments), gold.gold_parts(**arguments)
    families: dict[str, dict[str, Any]] = {}
    for family in ["all", *sorted(set(columns["family"]))]:
        members = [i for i, name in enumerate(columns["family"]) if family in ("all", name)]
        means = {name: sum(values[i] for i in members) / len(members) for name, values in parts.items()}
        interval = wilson_interval(means["correct"] * len(members), len(members))
        families[family] = {
            "prompts": len(members),
            "gold": sum(scores[i] for i in members) / len(members),
            "correct_interval": [interval.low, interval.high],
            "chance": tasks.CHANCE.get(family),
            **means,
        }
    return {"families": families, "scores": scores}


def _print(report: dict[str, Any], title: str) -> None:
    columns = ("family", "n", "correct", "95 %", "chance", "safe", "constr.", "style", "gold")
    table = Table(*columns, title=title, title_justify="left", box=None)
    style_weight = sum(gold.WEIGHTS[part] for part in gold.STYLE)
    for family, row in report["families"].items():
        low, high = row["correct_interval"]
        style = sum(gold.WEIGHTS[part] * row[part] for part in gold.STYLE) / style_weight
        chance = "" if row["chance"] is None else f"{row['chance']:.2f}"
        figures = [f"{row['safe']:.2f}", f"{row['constraints']:.2f}", f"{style:.2f}", f"{row['gold']:.3f}"]
        interval = f"{low:.2f} to {high:.2f}"
        table.add_row(family, str(row["prompts"]), f"{row['correct']:.3f}", interval, chance, *figures)
    Console().print(table)


def _show(row: dict[str, Any], answer: str, value: float) -> None:
    for message in row["prompt"]:
        print(f"  {message['role']:>9}: {message['content']}")
    print(f"  {'model':>9}: {answer!r}   gold {value:.2f}\n")


def learned(
    directory: Directory,
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents.")] = 1000,
    megabytes: Annotated[float, typer.Option(help="Training text for the 5-gram.")] = 25.0,
    as_json: AsJson = False,
) -> None:
    """How far a base model has come from a 5-gram model to the entropy floor, on held-out text.

    The 5-gram (interpolated Kneser-Ney) reads the same training text through the same tokenizer. The last
    figure is (model - floor) / (5-gram - floor): 1 is no better than counting, 0 is all there is to know.
    """
    from trueup.base.tokenizer import encode_documents
    from trueup.eval.loading import load_policy

    model, tokenizer = load_policy(directory)
    held_out = [row["text"] for row in datasets.rows("lab/text", "validation", documents=documents)]
    training = [row["text"] for row in datasets.rows("lab/text", "train", megabytes=megabytes)]
    size = sum(len(document.encode()) for document in held_out)
    tokens = encode_documents(tokenizer, held_out)
    figures = {
        "model": _model_bits(model, tokens) / size,
        "five_gram": _five_gram_bits(encode_documents(tokenizer, training), tokens, len(tokenizer)) / size,
        "floor": text.floors(held_out)["all"].bits_per_byte,
    }
    figures["ratio"] = (figures["model"] - figures["floor"]) / (figures["five_gram"] - figures["floor"])
    if as_json:
        print(json.dumps(figures))
        return
    table = Table("", "bits per byte", title=f"{directory} on {documents:,} held-out documents")
    for name, label in (("five_gram", "5-gram"), ("model", "model"), ("floor", "entropy floor")):
        table.add_row(label, f"{figures[name]:.4f}")
    table.add_section()
    table.add_row("(model - floor) / (5-gram - floor)", f"{figures['ratio']:.4f}")
    Console().print(table)


def _model_bits(model: Any, documents: list[list[int]]) -> float:
    """Bits a model needs for documents of ids (each begins with bos, which is free, and ends with eos)."""
    import math

    import torch

    bits = 0.0
    ordered = sorted(documents, key=len)
    with torch.inference_mode():
        for start in range(0, len(ordered), 64):
            batch = [torch.tensor(ids) for ids in ordered[start : start + 64]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)[:, 1:]
            logits = model(input_ids=ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="sum")
            bits += float(loss) / math.log(2)
    return bits


def _five_gram_bits(training: list[list[int]], held_out: list[list[int]], vocab_size: int) -> float:
    """Bits a 5-gram needs for the same tokens; the bos of each document is free for it too."""
    import numpy as np

    from trueup.recipes.lab.ngram import KneserNey

    stream = np.concatenate([np.array(ids) for ids in training])
    tested = np.concatenate([np.array(ids) for ids in held_out])
    probabilities = KneserNey(stream, vocab_size).probabilities(tested)
    begins = np.cumsum([0, *map(len, held_out[:-1])])
    return float(-np.log2(np.delete(probabilities, begins)).sum())
