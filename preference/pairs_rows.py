"""From candidates to the rows that are written, and the counts that tell what became of the others."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from trueup.eval.rendering import as_completions
from trueup.preference.pairs_rules import Compared, Labeller, Rule, make_pairs
from trueup.preference.pairs_samples import Candidates, Row

# A data set that was itself made here brings such columns along; they are not its prompts'.
OURS = ("score", "score_chosen", "score_rejected", "p_label")


@dataclass
class SplitRows:
    """The rows of one split, and what they were made from.

    Args:
        too_long: prompts that left no room for a completion.
        cut, empty, unscored: completions that were no answer; each is counted once.
        without: prompts that gave no row.
        ties, close: comparisons dropped, of equal scores and of scores nearer than min_margin.
        lengths: tokens of chosen and rejected, pair by pair.
        p_labels: the labeller's probability of its label, pair by pair.
        scores: of all completions that were scored.
        best: the highest of each prompt.
    """

    rows: list[Row] = field(default_factory=list)
    prompts: int = 0
    too_long: int = 0
    completions: int = 0
    cut: int = 0
    empty: int = 0
    unscored: int = 0
    without: int = 0
    ties: int = 0
    close: int = 0
    lengths: list[tuple[int, int]] = field(default_factory=list)
    p_labels: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)

    def count(self, drawn: Candidates, usable: Sequence[int]) -> None:
        """Takes the completions of one prompt into the counts."""
        self.prompts += 1
        self.completions += len(drawn.texts)
        cut = drawn.ended.count(False)
        empty = sum(ended and not text.strip() for ended, text in zip(drawn.ended, drawn.texts, strict=True))
        self.cut += cut
        self.empty += empty
        self.unscored += len(drawn.texts) - cut - empty - len(usable)
        self.scores += [score for score in drawn.scores if math.isfinite(score)]
        self.best += [max(drawn.scores[place] for place in usable)] if usable else []


def preference_rows(
    prompts: Iterable[Row],
    candidates: Iterable[Candidates],
    rule: Rule,
    labeller: Labeller,
    pairs_per_prompt: int,
    min_margin: float,
    seed: str,
) -> SplitRows:
    """Rows `prompt, chosen, rejected, score_chosen, score_rejected`, `p_label` if labels are noisy, and the
    prompt's own columns.

    Args:
        seed: decides comparisons and labels, together with the place of the prompt.
    """
    found = SplitRows()
    for place, (row, drawn) in enumerate(zip(prompts, candidates, strict=True)):
        usable = drawn.usable()
        scores = [drawn.scores[one] for one in usable]
        rng = Random(f"{seed} {place}")
        compared = make_pairs(scores, rule, labeller, pairs_per_prompt, min_margin, rng)
        found.count(drawn, usable)
        _take(found, compared, row, drawn, usable, labeller.noisy)
    return found


def _take(
    found: SplitRows, compared: Compared, row: Row, drawn: Candidates, usable: list[int], noisy: bool
) -> None:
    found.ties += compared.ties
    found.close += compared.close
    found.without += not compared.pairs
    for pair in compared.pairs:
        sides = usable[pair.chosen], usable[pair.rejected]
        chosen, rejected = as_completions([row["prompt"]] * 2, [drawn.texts[side] for side in sides])
        ours: dict[str, Any] = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        ours |= {"score_chosen": drawn.scores[sides[0]], "score_rejected": drawn.scores[sides[1]]}
        ours |= {"p_label": pair.p_label} if noisy else {}
        found.rows.append(ours | _columns(row))
        found.lengths.append((drawn.lengths[sides[0]], drawn.lengths[sides[1]]))
        found.p_labels.append(pair.p_label)


def best_rows(prompts: Iterable[Row], candidates: Iterable[Candidates], min_score: float | None) -> SplitRows:
    """Rows `prompt, completion, score` with the best completion of each prompt, if it reaches `min_score`,
    and the prompt's own columns: what SFT reads.
    """
    found = SplitRows()
    for row, drawn in zip(prompts, candidates, strict=True):
        usable = drawn.usable()
        found.count(drawn, usable)
        best = max(usable, key=lambda place: drawn.scores[place], default=None)
        if best is None or (min_score is not None and drawn.scores[best] < min_score):
            found.without += 1
            continue
        (completion,) = as_completions([row["prompt"]], [drawn.texts[best]])
        ours = {"prompt": row["prompt"], "completion": completion, "score": drawn.scores[best]}
        found.rows.append(ours | _columns(row))
    return found


def _columns(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "prompt" and name not in OURS}
