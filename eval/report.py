"""`report.html`: a comparison as one self-contained page, made of the files beside it and of nothing else.

Every figure on the page stands in one of `verdict.json`, `traces.json`, `manifest.json`, `scores.csv`,
`samples/`, and of a versus `sweep.json`; each section says in which.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from trueup.eval import report_plots as plots
from trueup.eval.compare_samples import BASELINE, SAMPLES, read_rows
from trueup.eval.compare_statistics import percent
from trueup.eval.pages import picture, render, themed
from trueup.eval.statistics import Interval
from trueup.recipes.directory import VERDICT, read_json

Json = dict[str, Any]

REPORT, MANIFEST, TRACES = "report.html", "manifest.json", "traces.json"
SWEEP = "sweep.json"  # of `trueup versus`: the settings tried, and which were chosen
SCORES, PROMPTS = "scores.csv", f"{SAMPLES}/prompts.jsonl"
PAIRS, ARMS = "pairs.csv", "arms.csv"
TEMPLATE = "report.html.jinja"
TRANSCRIPTS = 20
BITS = "bits per byte of held-out text"


def write_report(folder: Path) -> None:
    """The page, the plots as PNGs and the tables as CSV, from the other files of a comparison's folder."""
    verdict, traces = read_json(folder / VERDICT), read_json(folder / TRACES)
    write_tables(folder, verdict)
    filters = {"percent": _percent, "interval": _interval, "signed": _signed}
    page = render(
        TEMPLATE,
        filters,
        verdict=verdict,
        traces=traces,
        sweep=read_json(folder / SWEEP) if (folder / SWEEP).exists() else None,
        manifest=read_json(folder / MANIFEST),
        baseline=BASELINE,
        bits=BITS,
        names=[arm["name"] for arm in verdict["arms"] if not arm["best_of"] and arm["name"] != BASELINE],
        headlines=headlines(verdict),
        virtual=[arm["name"] for arm in verdict["arms"] if arm["best_of"]],
        matrix={(pair["a"], pair["b"]): pair for pair in verdict["pairs"]},
        plots=draw_plots(folder, verdict, traces["traces"]),
        tax=tax_table(verdict),
        transcripts=transcripts(folder, verdict),
        style=plots.styles([arm["name"] for arm in verdict["arms"]]),
    )
    (folder / REPORT).write_text(page, encoding="utf-8")


def headlines(verdict: Json) -> list[Json]:
    """The pairs in the order of interest: the arms among themselves, then against baseline and best-of-n."""
    reference = {arm["name"] for arm in verdict["arms"] if arm["best_of"] or arm["name"] == BASELINE}
    pairs = [pair for pair in verdict["pairs"] if not {pair["a"], pair["b"]} <= reference]
    return sorted(pairs, key=lambda pair: len(reference & {pair["a"], pair["b"]}))


def transcripts(folder: Path, verdict: Json) -> list[Json]:
    """Answers of all arms to 20 prompts drawn at random by the comparison's seed, never picked."""
    prompts = read_rows(folder / PROMPTS)
    drawn = sorted(Random(verdict["seed"]).sample(range(len(prompts)), min(TRANSCRIPTS, len(prompts))))
    said = {arm["name"]: read_rows(folder / arm["samples"][0]) for arm in verdict["arms"]}
    scores = _scores(folder, f"scorers/{verdict['scorers'][0]}")
    return [
        {
            "row": row,
            "prompt": _turns(prompts[row]["prompt"]),
            "family": prompts[row].get("family"),
            "answers": [
                {
                    "arm": arm,
                    "text": rows[row]["completion"],
                    "ended": rows[row]["ended"],
                    "score": scores[arm, row],
                }
                for arm, rows in said.items()
            ],
        }
        for row in drawn
    ]


def _scores(folder: Path, name: str) -> dict[tuple[str, int], float]:
    """(arm, row) -> score, of the first repetition."""
    with (folder / SCORES).open(encoding="utf-8", newline="") as file:
        return {
            (line["arm"], int(line["row"])): float(line[name])
            for line in csv.DictReader(file)
            if line["repetition"] == "0"
        }


def _turns(prompt: Any) -> list[Json]:
    return prompt if isinstance(prompt, list) else [{"role": "prompt", "content": prompt}]


# ------------------------------------------------------------------------------------------ plots and tables


def draw_plots(folder: Path, verdict: Json, traces: Sequence[Json]) -> dict[str, dict[str, str]]:
    """Name -> theme -> data URI; the PNGs go to the folder."""
    wanted: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "win_rates": (plots.win_rates, (verdict,)),
        "frontier": (plots.frontier, (verdict, traces)),
        "text": (plots.text, (verdict,)),
    }
    if any(arm["elo"] for arm in verdict["arms"]):
        wanted["ratings"] = (plots.ratings, (verdict,))
    if any(name.startswith("parts/") for name in verdict["arms"][0]["means"]):
        wanted["parts"] = (plots.parts, (verdict,))
    if "correct_by_family" in verdict["arms"][0]:
        wanted["families"] = (plots.families, (verdict,))
    found = {}
    for name, (plot, content) in wanted.items():
        (folder / f"{name}.png").write_bytes(picture(plot, content, "light", "png"))
        found[name] = themed(plot, content)
    return found


def write_tables(folder: Path, verdict: Json) -> None:
    """The pairs and the arms, one line each."""
    pairs = [
        {
            **{name: pair[name] for name in ("a", "b", "winner", "prompts", "missing")},
            **_flat("rate", pair["rate"]),
            **{name: pair[name] for name in ("wins", "ties", "losses")},
            **_flat("length_controlled", pair["length_controlled"]),
            "prompts_to_settle": pair["prompts_to_settle"],
        }
        for pair in verdict["pairs"]
    ]
    arms = [
        {
            "arm": arm["name"],
            **{k: v for name, mean in arm["means"].items() for k, v in _flat(name, mean).items()},
            "kl": arm["kl"]["per_sequence"],
            "kl_is_bound": arm["kl"]["bound"],
            "elo": arm["elo"],
            **arm["text"],
        }
        for arm in verdict["arms"]
    ]
    for name, rows in ((PAIRS, pairs), (ARMS, arms)):
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def _flat(name: str, interval: Mapping[str, float]) -> dict[str, float]:
    return {name: interval["estimate"], f"{name} low": interval["low"], f"{name} high": interval["high"]}


def tax_table(verdict: Json) -> dict[str, dict[str, Json]]:
    """Figure -> arm -> {"value", "stderr", "change", "within", "seeds"}: means over an arm's seeds, and what
    they differ from the baseline; `within`: no more than 95 % of noise would."""
    found: dict[str, dict[str, Json]] = {}
    for arm, entries in verdict["tax"].items():
        for task in entries[0]["lm_eval"] if entries else ():
            known = [one for one in entries if task in one["lm_eval"]]
            values, changes = (
                [one[of][task] for one in known if task in one[of]] for of in ("lm_eval", "change")
            )
            change, error = _mean(changes, "value"), _mean(changes, "stderr")
            found.setdefault(task, {})[arm] = {
                "value": _mean(values, "value"),
                "stderr": _mean(values, "stderr"),  # the documents are shared: more seeds do not shrink it
                "change": change,
                "within": None not in (change, error) and abs(change or 0) <= 1.96 * (error or 0),
                "seeds": [one["value"] for one in values],
            }
        bits = [one["bits_per_byte"] for one in entries if "bits_per_byte" in one]
        if bits:
            mean, before = sum(bits) / len(bits), verdict["tax"][BASELINE][0]["bits_per_byte"]
            row = {"value": mean, "stderr": None, "change": mean - before, "within": False, "seeds": bits}
            found.setdefault(BITS, {})[arm] = row
    return found


def _mean(entries: Sequence[Json], name: str) -> float | None:
    values = [entry[name] for entry in entries]
    return None if None in values or not values else sum(values) / len(values)


def _percent(interval: Mapping[str, float]) -> str:
    return percent(Interval(**interval))


def _interval(interval: Mapping[str, float], digits: int = 3) -> str:
    return f"{interval['estimate']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def _signed(interval: Mapping[str, float], digits: int = 3) -> str:
    low, high = interval["low"], interval["high"]
    return f"{interval['estimate']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
