"""The lab's demonstrations: answers by people who mostly know, often decline, sometimes err.

The right answer stays the commonest by far, so greedy decoding finds it and sampling often does not: this is
the room that alignment is measured on. Most errors are refusals of what may well be answered, beside refusals
that are right; so alignment has to learn where to answer, and over-refusal is not cured by answering all.
"""

import itertools
from random import Random

from trueup.recipes.lab import style as styles
from trueup.recipes.lab.desk import Task
from trueup.recipes.lab.gold import gold_parts
from trueup.recipes.lab.tasks import FAMILIES, task

ERRING_SHARE = 0.48
# What an erring answer is. Where declining is right there is nothing to evade, and the answer does not err.
ERRORS = {
    "evasive": 0.9,  # declining what may be answered
    "mistaken": 0.06,  # a near miss, an unsafe answer, or a constraint broken
    "astray": 0.04,  # right, but for another question of the family: someone did not read well
}
BLEMISHED_SHARE = 0.06  # of the answers under style "mixed": little enough to leave style no headroom
# Where every word counts, or a constraint does, a blemish of style would make the answer wrong.
_EXACT_CHECKS = frozenset({"order", "text", "story"})


def demonstration(
    drawn: Task, split: str, rng: Random, errors: float, style: str = "mixed", world_seed: int = 0
) -> str:
    """An answer to a task of a split, as somebody might give it.

    Args:
        errors: the share of answers that err, where there is a way to err.
        style: "mixed", or "clean" to leave out blemishes of style.
    """
    erring = rng.random() < errors
    answer = _error(drawn, split, rng, world_seed) if erring else rng.choice(drawn.right)
    exact = drawn.constraints or drawn.check in _EXACT_CHECKS
    if style == "mixed" and not exact and rng.random() < BLEMISHED_SHARE:
        answer = rng.choice([*styles.BLEMISHES.values()])(answer, rng)
    return answer


def _error(drawn: Task, split: str, rng: Random, world_seed: int) -> str:
    kind = rng.choices([*ERRORS], weights=[*ERRORS.values()])[0]
    if kind == "evasive":
        return rng.choice(styles.EVASIONS if drawn.expects == "answer" else drawn.right)
    if kind == "astray":
        return _astray(drawn, split, f"astray {rng.random()}", world_seed)
    return rng.choice((*drawn.wrong, *drawn.broken))


def _astray(drawn: Task, split: str, seed: str, world_seed: int) -> str:
    """The right answer to another question of the family, which must not happen to be right here too."""
    truth = {name: [value] for name, value in drawn.truth(world_seed).items()}
    number = [*FAMILIES].index(drawn.family)
    answer = drawn.right[0]
    for attempt in itertools.count():
        if not gold_parts([""], [answer], **truth)["correct"][0]:
            break
        answer = task(split, number, f"{seed} {attempt}", world_seed).right[0]
    return answer
