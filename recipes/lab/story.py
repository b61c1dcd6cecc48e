"""The little stories of the world: one grammar that text writes with, chat plans with and gold reads with."""

from collections.abc import Callable, Sequence
from random import Random

from trueup.recipes.lab import grammar
from trueup.recipes.lab.grammar import NotInGrammar, Options, Patterns, Pen
from trueup.recipes.lab.wording import fill, named, pronoun
from trueup.recipes.lab.world import ANIMALS, FOODS, SPOTS, THINGS, World

WHEN = ("One morning ", "One evening ", "Long ago ", "Last summer ", "After the rain ", "On a cold day ")
OPENINGS = (
    "{n} walked to the <spot> with a <thing>.",
    "{n} went out to look for a <thing>.",
    "{n} met a <animal> near the <spot>.",
    "{n} found a <thing> behind the <spot>.",
    "{n} followed a <animal> with some <food>.",
)
MIDDLES = (
    "There {n} saw a <animal> beside the <spot>.",
    "A <animal> came running with a <thing>.",
    "{N} sat down near the <spot> and ate some <food>.",
    "{N} gave some <food> to a <animal>.",
    "{N} tripped over a <thing> in front of the <spot>.",
    "Behind the <spot> stood a <animal>.",
    "{N} sang a song about a <thing>.",
)
ENDINGS = (
    "In the end {n} went home and was happy.",
    "So {n} laughed and went home.",
    "That night {n} slept very well.",
    "{N} never forgot that day.",
)
MOST_SENTENCES = 5

SLOTS: dict[str, Sequence[str]] = {"animal": ANIMALS, "thing": THINGS, "food": FOODS, "spot": SPOTS}
_SLOT_OPTIONS = {slot: Options(words) for slot, words in SLOTS.items()}
_WHEN_OPTIONS = Options(WHEN)
_MIDDLE_LABELS = frozenset(map(str, range(len(MIDDLES))))


def teller(world: World, person: str) -> Callable[[Pen], None]:
    """The document function that tells a story about a person: an opening, some middles, an ending."""
    openings = Patterns([fill(text, named(world, person)) for text in OPENINGS], _SLOT_OPTIONS)
    others = Patterns([fill(text, pronoun(world, person)) for text in MIDDLES + ENDINGS], _SLOT_OPTIONS)

    def tell(pen: Pen) -> None:
        pen.choose(_WHEN_OPTIONS)
        openings.write(pen)
        used: set[str] = set()
        for _ in range(MOST_SENTENCES - 2):
            pen.write(" ")
            label = others.write(pen, without=used)
            if label not in _MIDDLE_LABELS:
                return
            used.add(label)
        pen.write(" ")
        others.write(pen, without=_MIDDLE_LABELS)

    return tell


def is_story(world: World, person: str, text: str) -> bool:
    """Whether a text is, from first to last character, a story about that person."""
    try:
        grammar.read(teller(world, person), text)
    except NotInGrammar:
        return False
    return True


def compose(world: World, person: str, words: Sequence[str], sentences: int, rng: Random) -> str:
    """A story of exactly so many sentences in which every word of `words` (nouns of SLOTS) occurs.

    It takes more sentences than words: an ending has no room for any.
    """
    while True:  # draw shapes until the slots suffice for the words; a few tries
        shape = [rng.choice(OPENINGS), *rng.sample(MIDDLES, sentences - 2), rng.choice(ENDINGS)]
        missing = list(words)
        told = [_fill_slots(text, missing, rng) for text in shape]
        if not missing:
            voices = [named(world, person)] + [pronoun(world, person)] * (sentences - 1)
            return rng.choice(WHEN) + " ".join(
                fill(text, voice) for text, voice in zip(told, voices, strict=True)
            )


def _fill_slots(sentence: str, missing: list[str], rng: Random) -> str:
    """Fill the slots of one sentence, taking words from `missing` (and removing them) where they fit."""
    for slot, words in SLOTS.items():
        while f"<{slot}>" in sentence:
            word = next((wanted for wanted in missing if wanted in words), None)
            if word is None:
                word = rng.choice(words)
            else:
                missing.remove(word)
            sentence = sentence.replace(f"<{slot}>", word, 1)
    return sentence
