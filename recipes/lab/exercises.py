"""Small skills of the lab that are not facts about anyone: sums, sorted and reversed words, rewriting."""

from collections.abc import Sequence

from trueup.recipes.lab.world import ANIMALS, THINGS

# Words to sort and to reverse; no two begin with the same letter.
WORDS = (
    "apple", "boat", "cat", "door", "egg", "fish", "goat", "hat", "ice", "jar", "kettle", "lamp", "mouse",
    "nut", "oven", "pear", "rope", "stone", "tree", "umbrella", "vase", "well",
)  # fmt: skip

# (expression, result). Differences whose result is one of their own numbers are left out: 8 - 4 would be
# answered by repeating the question.
SUMS: dict[str, int] = {f"{a} + {b}": a + b for a in range(1, 13) for b in range(1, 13)} | {
    f"{a} - {b}": a - b for a in range(3, 16) for b in range(1, min(a, 10)) if a != 2 * b
}

# Three ways to rewrite a sentence.
REQUEST_VERBS = ("bring", "find", "give", "lend", "sell", "show")
REQUEST_OBJECTS = THINGS + ANIMALS
PAST_VERBS = ("found", "hid", "left", "lost", "saw")
ADJECTIVES = ("big", "dirty", "heavy", "little", "old", "shiny")
ORNAMENTS = ("and very beautiful", "and rather strange", "and quite ordinary")


def in_order(words: Sequence[str]) -> str:
    return ", ".join(sorted(words))


def backwards(words: Sequence[str]) -> str:
    return ", ".join(reversed(words))


def rude_request(verb: str, item: str) -> str:
    return f"{verb.capitalize()} me the {item}!"


def polite_request(verb: str, item: str) -> str:
    return f"Could you please {verb} me the {item}?"


def event(subject: str, verb: str, item: str, spot: str) -> str:
    return f"{subject} {verb} the {item} near the {spot}."


def long_sentence(adjective: str, ornament: str, item: str, spot: str) -> str:
    return f"The {adjective} {ornament} {item} lay behind the {spot}."


def short_sentence(item: str, spot: str) -> str:
    return f"The {item} lay behind the {spot}."
