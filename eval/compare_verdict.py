"""From tables of scores to `verdict.json`, and the same as tables on the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trueup.eval.compare_lineage import Findings, choice_of
from trueup.eval.compare_pairwise import Duels
from trueup.eval.compare_samples import BASELINE, Answers, Arm, Measures, Row, text_figures
from trueup.eval.compare_statistics import (
    ELO,
    bradley_terry,
    compare,
    difference,
    fallen_parts,
    family_means,
    length_controlled,
    mean_interval,
    percent,
    points,
    size_note,
    verdict,
)
from trueup.eval.kl import best_of_n_kl
from trueup.eval.statistics import Interval

Json = dict[str, Any]

SCORERS = "scorers/"
FAMILY = "family"  # the column that says what kind of prompt it is
CORRECT = "parts/correct"


def conclude(
    arms: Sequence[Arm],
    answers: Mapping[str, Sequence[Answers]],
    tables: Mapping[str, Measures],
    duels: Duels,
    prompts: Sequence[Row],
    findings: Findings,
) -> Json:
    """All figures of a comparison, JSON-able, without times.

    Args:
        tables: arm -> measure -> (repetitions, prompts); the measures are `scorers/NAME` (the first ranks),
            `parts/NAME`, `proxy`, `characters`, `tokens`, `log_ratio`, `k3`.
        duels: the outcomes of every pair, by what ranks.
        findings: what its lineage says against a verdict, or against comparing at all.
    """
    scorers = [name.removeprefix(SCORERS) for name in tables[BASELINE] if name.startswith(SCORERS)]
    seeds = max(len(said) for said in answers.values())
    ratings = _ratings(duels)
    pairs = [_pair(a, b, tables, duels, findings) for a, b in duels.outcomes]
    return {
        "format": 1,
        "scorers": scorers,
        "prompts": len(prompts),
        "seeds": seeds,
        "note": size_note(seeds, len(prompts)),
        **asdict(findings),
        "arms": [
            _arm(arm, answers[arm.name], tables, prompts)
            | ratings.get(arm.name, {"bradley_terry": None, "elo": None})
            for arm in arms
        ],
        "pairs": pairs,
    }


def _ratings(duels: Duels) -> dict[str, Json]:
    """Arm -> strength over the baseline, of those that a chain of outcomes leads to from there."""
    reached, known = set[str](), {BASELINE}
    while known - reached:
        reached |= known
        known |= {name for pair in duels.outcomes if reached & set(pair) for name in pair}
    results = {pair: table for pair, table in duels.outcomes.items() if pair[0] in reached}
    found = bradley_terry(results, BASELINE) if results else {}
    return {
        name: {"bradley_terry": asdict(strength), "elo": ELO * strength.estimate}
        for name, strength in found.items()
    }


def _pair(a: str, b: str, tables: Mapping[str, Measures], duels: Duels, findings: Findings) -> Json:
    """Two arms; the shares, rates and parts are a's over b."""
    ours, theirs = tables[a], tables[b]
    outcome = compare(duels.outcomes[a, b])
    controlled = length_controlled(duels.outcomes[a, b], duels.lengths[a, b])
    parts = {
        name.removeprefix("parts/"): difference(ours[name], theirs[name])
        for name in ours
        if name.startswith("parts/")
    }
    found = verdict(a, b, outcome, controlled)
    falls: dict[str, str] = {}
    if found.winner:
        ours, theirs = (ours, theirs) if found.winner == a else (theirs, ours)
        ahead = {name: difference(ours[f"parts/{name}"], theirs[f"parts/{name}"]) for name in parts}
        falls = {name: points(ahead[name].difference) for name in fallen_parts(ahead)}
    void = [f"{name}: {findings.void[name]}" for name in (a, b) if name in findings.void]
    return {
        "a": a,
        "b": b,
        "winner": None if void else found.winner,
        "text": _in_words(a, b, found.text, falls, void, bool(findings.unequal)),
        "prompts_to_settle": found.to_settle,
        **asdict(outcome),
        "length_controlled": asdict(controlled),
        "parts": {name: asdict(part) for name, part in parts.items()},
        "worse_in": list(falls),
    }


def _in_words(a: str, b: str, text: str, falls: Mapping[str, str], void: Sequence[str], unequal: bool) -> str:
    if void:
        return f"No verdict on {a} and {b}. {'; '.join(void)}"
    if falls:
        worse = "; ".join(f"{name} {change}" for name, change in falls.items())
        text += f". But the winner is worse in: {worse}"
    return f"Unequal arms: {text}" if unequal else text


def _arm(
    arm: Arm, answers: Sequence[Answers], tables: Mapping[str, Measures], prompts: Sequence[Row]
) -> Json:
    table, base = tables[arm.name], tables[BASELINE]
    shown = [n for n in table if n not in ("log_ratio", "k3") and not np.isnan(table[n]).all()]
    figures = [text_figures(said) for said in answers]
    found: Json = {
        "name": arm.name,
        "models": [
            {
                "path": str(one.path),
                "identity": one.identity,
                "stage": one.record.get("stage", "foreign"),
                "choice": choice.in_words if (choice := choice_of(one)) else None,
            }
            for one in arm.directories
        ],
        "best_of": arm.best_of or None,
        "samples": [said.file for said in answers],
        "means": {
            name: asdict(mean_interval(table[name], share=name.startswith("parts/"))) for name in shown
        },
        "by_seed": {name: np.nanmean(table[name], axis=1).tolist() for name in shown},
        "differences": {
            name: asdict(difference(table[name], base[name]).difference)
            for name in shown
            if arm.name != BASELINE
        },
        "kl": _kl(arm, table),
        "text": {name: float(np.mean([one[name] for one in figures])) for name in figures[0]},
        "text_by_seed": figures,
    }
    if CORRECT in table and FAMILY in prompts[0]:
        by_family = family_means(table[CORRECT], [row[FAMILY] for row in prompts])
        found["correct_by_family"] = {name: asdict(interval) for name, interval in by_family.items()}
    return found


def _kl(arm: Arm, table: Measures) -> Json:
    """KL from the baseline in nats per completion; of best-of-n the analytic bound; None where there is
    none."""
    if arm.best_of:
        return {"per_sequence": best_of_n_kl(arm.best_of), "bound": True}
    if "log_ratio" not in table:  # it reads and writes other tokens than the baseline
        return {"per_sequence": None, "bound": False}
    sums, k3, tokens = table["log_ratio"], table["k3"], table["tokens"]
    interval = mean_interval(sums)
    stderr = sums.std(axis=1, ddof=1) / np.sqrt(sums.shape[1]) if sums.shape[1] > 1 else np.array([np.nan])
    by_seed = [
        {"per_sequence": float(mean), "stderr": float(error)}
        for mean, error in zip(sums.mean(axis=1), stderr, strict=True)
    ]
    return {
        "per_sequence": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "k3_per_token": float(k3.sum() / tokens.sum()),
        "by_seed": by_seed,
        "bound": False,
    }


# ------------------------------------------------------------------------------------------------ terminal


def print_verdict(found: Json) -> None:
    """Verdict first, then the tables it rests on."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print()
    for pair in found["pairs"]:
        console.print(pair["text"], highlight=False, markup=False)
    for note in [*found["unequal"], *found["unknown"], *([found["note"]] if found["note"] else [])]:
        console.print(note, style="yellow", highlight=False, markup=False)
    table = Table("pair", "win rate", "win", "tie", "loss", "equal length", "by seed", box=None)
    for pair in found["pairs"]:
        shares = [f"{pair[name]:.1%}" for name in ("wins", "ties", "losses")]
        seeds = " ".join(f"{rate:.3f}" for rate in pair["by_seed"])
        rates = [percent(Interval(**pair[name])) for name in ("rate", "length_controlled")]
        table.add_row(f"{pair['a']} : {pair['b']}", rates[0], *shares, rates[1], seeds)
    console.print(table)
    _print_arms(console, found["arms"])


def _print_arms(console: Any, arms: Sequence[Json]) -> None:
    from rich.table import Table

    table = Table("", *(arm["name"] for arm in arms), box=None)
    for name in (name for name in arms[0]["means"] if name != "characters"):
        cells = [_short(arm["means"][name]) if name in arm["means"] else "" for arm in arms]
        table.add_row(name.removeprefix("scorers/").removeprefix("parts/"), *cells)
    table.add_row("KL, nats", *(_short_kl(arm["kl"]) for arm in arms))
    table.add_row("Elo", *("" if arm["elo"] is None else f"{arm['elo']:+.0f}" for arm in arms))
    console.print(table)


def _short_kl(kl: Json) -> str:
    if kl["per_sequence"] is None:
        return "other tokens"
    return "≤ " * kl["bound"] + f"{kl['per_sequence']:.2f}"


def _short(interval: Json) -> str:
    reach = (interval["high"] - interval["low"]) / 2
    return f"{interval['estimate']:.3f} ±{reach:.3f}"
