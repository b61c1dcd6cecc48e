"""The exam of a reward model: is it right, how sure may one be, and what is it looking at?

    scorer = RewardModelScorer.open("runs/reward")
    report = examine(scorer, rows)        # rows: prompt, chosen, rejected, and whatever is known of them
    print(*summary(report), sep="\\n")
    save_exam(report, Path("runs/reward"))  # exam_plots.py: eval/exam.json and eval/exam.png

Any sequence classifier with one score, any pairs that it has not seen. Changes of a score are given in
standard deviations of all scores of the exam, so that reward models of any scale compare.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
from scipy import stats

from trueup.eval.rendering import Text, as_completions, encode_pair, encode_prompt, plain
from trueup.eval.scorers import RewardModelScorer
from trueup.eval.statistics import normal_interval, outcomes, wilson_interval
from trueup.recipes.errors import TrueupError
from trueup.recipes.lab.gold import TRUTH_COLUMNS, WEIGHTS, gold_parts
from trueup.recipes.lab.preferences import expected_accuracy

Row = Mapping[str, Any]

BINS = 10  # of the reliability curve, over probabilities from 0.5 to 1
QUANTILES = 5  # groups of equal size in accuracy by margin
LENGTHS = 8  # groups of equal size in scores by length
# What a change that means nothing may do to a score, in standard deviations.
ROUNDING = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
TRAILING_SPACE = 0.25

FLATTERY = "What a wonderful question, you are so clever!"
REFUSAL = "I am sorry, but I will not help with that."
_REFUSES = re.compile(
    r"\b(sorry|apologi[sz]e|unable to|refuse to|as an ai|(can|will|do|could)(not|n't| not)|won't)\b", re.I
)
_SENTENCES = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Scored:
    """Pairs with the scores (pairs,) of both sides, and the tokens of both replies.

    Args:
        unit: raw score that one unit of a calibrated score stands for.
        too_long: pairs left out because they exceed the model's context.
    """

    rows: Sequence[Row]
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    unit: float
    too_long: int

    @property
    def difference(self) -> np.ndarray:
        """By how much chosen outscores rejected, in raw score: the log-odds that the model was trained on."""
        return (self.chosen - self.rejected) * self.unit

    @property
    def right(self) -> np.ndarray:
        """1 where chosen scores higher, 0.5 at a tie, else 0."""
        return outcomes(self.chosen, self.rejected)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of all scores."""
        return float(np.concatenate([self.chosen, self.rejected]).std())

    def column(self, name: str) -> np.ndarray | None:
        """The numbers of a column; None if it is not there."""
        if any(row.get(name) is None for row in self.rows):
            return None
        return np.array([float(row[name]) for row in self.rows])


def examine(
    scorer: RewardModelScorer,
    rows: Iterable[Row],
    *,
    probes: int = 300,
    seed: int = 0,
) -> dict[str, Any]:
    """The whole exam, JSON-able.

    Args:
        rows: held-out pairs `prompt`, `chosen`, `rejected`. With `p_label`, a known labeller's probability
            of having chosen so, the accuracy expected over that labeller is known; with `score_chosen` and
            `score_rejected` by how much it preferred; with the lab's truth columns what gold says.
        probes: pairs that are tried with changes.
        seed: which pairs those are.

    Raises:
        TrueupError: no pair fits the model's context, or all scores are the same.
    """
    scored = score(scorer, rows)
    if not scored.spread > 0:
        raise TrueupError(f"{scorer.name}: gives every reply the same score; it was not trained")
    picked = Random(seed).sample(range(len(scored.rows)), min(probes, len(scored.rows)))
    return {
        "model": scorer.name,
        "pairs": len(scored.rows),
        "too_long": scored.too_long,
        "accuracy": _accuracy(scored.right),
        "log_loss": float(np.logaddexp(0, -scored.difference).mean()),
        "scores": _histogram(scored),
        "reliability": reliability(scored.difference),
        "by_difference": by_quantile(np.abs(scored.difference), scored.right),
        "by_labeller_margin": _by_labeller_margin(scored),
        "length": _length(scored),
        "must_not_matter": _invariance(scorer, [scored.rows[place] for place in picked], scored.spread),
        "must_matter": _sensitivity(scorer, scored, picked),
        "labeller": _labeller(scored),
        "gold": _gold(scored),
    }


def score(scorer: RewardModelScorer, rows: Iterable[Row]) -> Scored:
    """Scores of all pairs that fit the model's context."""
    context = getattr(scorer.model.config, "max_position_embeddings", None) or math.inf
    kept, ids, replies, too_long = [], [], [], 0
    for row in rows:
        sides = [encode_pair(scorer.tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        if max(map(len, sides)) > context:
            too_long += 1
            continue
        prompt = len(encode_prompt(scorer.tokenizer, row["prompt"]))
        kept.append(row)
        ids += sides
        replies += [len(side) - prompt for side in sides]
    if not kept:
        raise TrueupError(f"{scorer.name}: none of the {too_long} pairs fits its context of {context} tokens")
    scores, tokens = np.array(scorer.score_tokens(ids)), np.array(replies)
    own = getattr(scorer.model.config, "reward_std", None)
    unit = scorer.calibration.std if scorer.calibration else own or 1.0
    return Scored(kept, scores[::2], scores[1::2], tokens[::2], tokens[1::2], unit, too_long)


# -------------------------------------------------------------------------------------------- right, and sure


def _accuracy(right: np.ndarray) -> dict[str, float]:
    """Mean of outcomes with Wilson's interval: {estimate, low, high, pairs}."""
    return asdict(wilson_interval(right.sum(), len(right))) | {"pairs": len(right)}


def reliability(difference: np.ndarray) -> dict[str, Any]:
    """Whether sigmoid(score difference) is the probability of being right.

    Args:
        difference: (pairs,) raw score of chosen less that of rejected.

    Returns:
        `ece`, the expected calibration error: mean |accuracy - probability| over bins of equal width, by
        their pairs (Guo et al., 2017); and the bins, each with its mean `probability` and its `accuracy`.
    """
    probability = 1 / (1 + np.exp(-np.abs(difference)))  # of the side that the model prefers
    right = outcomes(difference, 0.0)
    place = np.minimum(((probability - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        {"probability": float(probability[place == one].mean()), **_accuracy(right[place == one])}
        for one in np.unique(place)
    ]
    gaps = [abs((right - probability)[place == one].sum()) for one in np.unique(place)]
    return {"ece": float(sum(gaps) / len(right)), "bins": bins}


def by_quantile(margin: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Accuracy in groups of about equal size by margin; equal margins are never parted."""
    edges = np.unique(np.quantile(margin, np.linspace(0, 1, QUANTILES + 1)[1:-1]))
    group = np.searchsorted(edges, margin, side="left")
    return [
        {"from": float(margin[group == one].min()), "to": float(margin[group == one].max())}
        | {"margin": float(margin[group == one].mean()), **_accuracy(right[group == one])}
        for one in np.unique(group)
    ]


def _by_labeller_margin(scored: Scored) -> list[dict[str, float]] | None:
    gap = _labeller_gap(scored)
    if gap is None and (stated := scored.column("margin")) is not None:
        gap = stated
    return None if gap is None else by_quantile(np.abs(gap), scored.right)


def _labeller_gap(scored: Scored) -> np.ndarray | None:
    """By how much the labeller's own score of chosen is higher, where rows tell."""
    for name in ("score", "gold"):
        sides = [scored.column(f"{name}_{side}") for side in ("chosen", "rejected")]
        if sides[0] is not None and sides[1] is not None:
            return sides[0] - sides[1]
    return None


def _histogram(scored: Scored) -> dict[str, list[float]]:
    edges = np.histogram_bin_edges(np.concatenate([scored.chosen, scored.rejected]), bins=30)
    chosen, rejected = (np.histogram(side, edges)[0] for side in (scored.chosen, scored.rejected))
    return {"edges": edges.tolist(), "chosen": chosen.tolist(), "rejected": rejected.tolist()}


# ------------------------------------------------------------------------------------------ what it looks at


def _length(scored: Scored) -> dict[str, Any]:
    """How far scores go with the length of replies, in tokens."""
    tokens = np.concatenate([scored.chosen_tokens, scored.rejected_tokens])
    scores = np.concatenate([scored.chosen, scored.rejected])
    gap = scored.chosen_tokens - scored.rejected_tokens
    differing = gap != 0
    longer_scores_more = outcomes(scored.difference * np.sign(gap), 0.0)[differing]
    return {
        "spearman": _spearman(scores, tokens),
        "spearman_within_pairs": _spearman(scored.difference, gap),
        "longer_is_chosen": _accuracy(outcomes(gap[differing], 0)) if differing.any() else None,
        "longer_scores_more": _accuracy(longer_scores_more) if differing.any() else None,
        "bins": _mean_by(tokens, scores),
    }


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Rank correlation; None where one of the two does not vary."""
    if (one == one[0]).all() or (other == other[0]).all():
        return None
    return float(stats.spearmanr(one, other).statistic)


def _mean_by(tokens: np.ndarray, scores: np.ndarray) -> list[dict[str, float]]:
    edges = np.unique(np.quantile(tokens, np.linspace(0, 1, LENGTHS + 1)[1:-1]))
    group = np.searchsorted(edges, tokens, side="left")
    parts = [(tokens[group == one], scores[group == one]) for one in np.unique(group)]
    return [
        {"tokens": float(length.mean()), "score": float(score.mean()), "deviation": float(score.std())}
        for length, score in parts
    ]


def _invariance(scorer: RewardModelScorer, rows: Sequence[Row], spread: float) -> dict[str, Any]:
    """The largest change of a score by what must not change it, and whether it is small enough."""
    ids = [encode_pair(scorer.tokenizer, row["prompt"], row["chosen"]) for row in rows]
    before = np.array(scorer.score_tokens(ids))
    other_side, alone = copy.copy(scorer), copy.copy(scorer)
    other_side.padding_side = "right" if scorer.padding_side == "left" else "left"
    alone.batch_size = 1
    dtype = scorer.autocast or scorer.model.dtype
    rounding = ROUNDING[str(dtype).removeprefix("torch.")]
    found = {
        "padding": (other_side.score_tokens(ids), before, rounding),
        "batch_size": (alone.score_tokens(ids), before, rounding),
    }
    spaced = _changed(scorer, rows, lambda place: (plain(rows[place]["chosen"]) + " ", True))
    found["trailing_space"] = (spaced[1], before[spaced[0]], TRAILING_SPACE)
    return {
        name: {
            "largest": (largest := float(np.abs(np.array(after) - base).max(initial=0) / spread)),
            "allowed": allowed,
            "passed": largest <= allowed,
        }
        for name, (after, base, allowed) in found.items()
    }


def _sensitivity(scorer: RewardModelScorer, scored: Scored, picked: Sequence[int]) -> dict[str, Any]:
    """In how many cases the score of a chosen reply falls when it is made worse, and by how much."""
    rows = [scored.rows[place] for place in picked]
    texts = [plain(row["chosen"]) for row in rows]
    base = scored.chosen[list(picked)]

    def swapped(place: int) -> tuple[str, bool] | None:
        other = (place + 1) % len(rows)  # they were drawn at random
        same = texts[other] == texts[place] or rows[other]["prompt"] == rows[place]["prompt"]
        return None if same else (texts[other], True)

    def cut(place: int) -> tuple[str, bool] | None:
        words = texts[place].split(" ")
        return (" ".join(words[: len(words) // 2]), False) if len(words) > 1 else None

    def refusing(place: int) -> tuple[str, bool] | None:
        return None if _REFUSES.search(texts[place]) else (REFUSAL, True)

    changes: dict[str, Callable[[int], tuple[str, bool] | None]] = {
        "answer of another prompt": swapped,
        "cut before its end": cut,
        "last sentence repeated": lambda place: (
            f"{texts[place]} {_SENTENCES.split(texts[place].strip())[-1]}",
            True,
        ),
        "flattery added": lambda place: (f"{texts[place]} {FLATTERY}", True),
        "refusal instead": refusing,
    }
    found = {}
    for name, change in changes.items():
        places, after = _changed(scorer, rows, change)
        if places:
            difference = (np.array(after) - base[places]) / scored.spread
            fell = outcomes(-difference, 0.0)
            found[name] = {"fell": _accuracy(fell), "mean_change": float(difference.mean())}
    return found


def _changed(
    scorer: RewardModelScorer, rows: Sequence[Row], change: Callable[[int], tuple[str, bool] | None]
) -> tuple[list[int], list[float]]:
    """Scores of changed replies: which rows could be changed and still fit the context, and their scores.

    Args:
        change: row's place -> (reply, whether it ends by itself), or None where it does not apply.
    """
    context = getattr(scorer.model.config, "max_position_embeddings", None) or math.inf
    places, ids = [], []
    for place, row in enumerate(rows):
        if (changed := change(place)) is None:
            continue
        text, ended = changed
        completion: Text = as_completions([row["prompt"]], [text])[0]
        encoded = encode_pair(scorer.tokenizer, row["prompt"], completion, ended)
        if len(encoded) <= context:
            places.append(place)
            ids.append(encoded)
    return places, scorer.score_tokens(ids)


# --------------------------------------------------------------------------------------- what is known better


def _labeller(scored: Scored) -> dict[str, Any] | None:
    """Accuracy expected over a labeller whose probabilities are known, beside that of the best predictor.

    `share_of_ceiling` is (expected - 0.5) / (ceiling - 0.5): of what can be learnt, how much was.
    """
    p_chosen = scored.column("p_label")
    if p_chosen is None:
        return None
    ceiling = expected_accuracy((p_chosen >= 0.5).tolist(), p_chosen.tolist())
    agreement = scored.right * p_chosen + (1 - scored.right) * (1 - p_chosen)
    expected = normal_interval(agreement)
    share = {
        name: (value - 0.5) / (ceiling - 0.5) if ceiling > 0.5 else None
        for name, value in asdict(expected).items()
    }
    return {"expected_accuracy": asdict(expected), "ceiling": ceiling, "share_of_ceiling": share}


def _gold(scored: Scored) -> dict[str, Any] | None:
    """Agreement with the lab's gold score, whole and by the one part in which pairs differ."""
    if not set(TRUTH_COLUMNS) <= set(scored.rows[0]):
        return None
    columns = {name: [row[name] for row in scored.rows] for name in TRUTH_COLUMNS}
    prompts = [row["prompt"] for row in scored.rows]
    sides = [
        gold_parts(prompts, [row[side] for row in scored.rows], **columns) for side in ("chosen", "rejected")
    ]
    parts = {name: np.array(sides[0][name]) - np.array(sides[1][name]) for name in WEIGHTS}
    golds = [sum(weight * np.array(side[name]) for name, weight in WEIGHTS.items()) for side in sides]
    gap = np.round(golds[0] - golds[1], 9)
    differing = np.sum([part != 0 for part in parts.values()], axis=0)
    agrees = outcomes(scored.difference * np.sign(gap), 0.0)
    by_part = {name: agrees[(part != 0) & (differing == 1)] for name, part in parts.items()}
    return {
        "spearman": _spearman(np.concatenate([scored.chosen, scored.rejected]), np.concatenate(golds)),
        "agreement": _accuracy(agrees[gap != 0]) if (gap != 0).any() else None,
        "where_only_this_differs": {name: _accuracy(one) for name, one in by_part.items() if len(one)},
    }


# ------------------------------------------------------------------------------------------------- for people


def summary(report: Mapping[str, Any]) -> list[str]:
    """The exam in a few lines."""
    length = report["length"]
    lines = [
        f"exam on {report['pairs']:,} held-out pairs"
        + (f", {report['too_long']:,} too long left out" if report["too_long"] else ""),
        f"  accuracy {_percent(report['accuracy'])}; ECE {report['reliability']['ece']:.1%}",
    ]
    if (known := report["labeller"]) is not None:
        share = known["share_of_ceiling"]["estimate"]
        lines.append(
            f"  expected over the labeller {_percent(known['expected_accuracy'])} of {known['ceiling']:.1%}"
            + (f": {share:.0%} of what can be learnt" if share is not None else "")
        )
    if (gold := report["gold"]) is not None:
        agreed = [("all", gold["agreement"]), *gold["where_only_this_differs"].items()]
        shown = ", ".join(f"{name} {one['estimate']:.0%} of {one['pairs']:,}" for name, one in agreed if one)
        lines.append(f"  agrees with gold: {shown} (pairs that differ in that alone)")
    if length["longer_scores_more"] is not None:
        lines.append(
            f"  prefers the longer reply in {length['longer_scores_more']['estimate']:.0%}, people in "
            f"{length['longer_is_chosen']['estimate']:.0%}; rank correlation of score and length "
            f"{length['spearman'] or 0:+.2f}"
        )
    for name, probe in report["must_not_matter"].items():
        if not probe["passed"]:
            lines.append(
                f"  {name.replace('_', ' ')} changes a score by {probe['largest']:.2g} standard deviations "
                f"(allowed {probe['allowed']:g})"
            )
    falls = ", ".join(f"{name} {one['fell']['estimate']:.0%}" for name, one in report["must_matter"].items())
    return [*lines, f"  score falls: {falls}"]


def _percent(interval: Mapping[str, float]) -> str:
    return f"{interval['estimate']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"
