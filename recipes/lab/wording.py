"""How the facts of the world are put into English: statements, what nobody knows, questions.

Templates hold {N} / {n} for the subject (capital or not), {P} / {p} its possessive, {o} its object form, {v}
the values, and [live|lives] for the verb with "I" and with anyone else.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from trueup.recipes.lab.world import World, article

# The first wording of a relation has its value last, with no other fact's first wording beginning like it.
STATEMENTS: dict[str, tuple[str, ...]] = {
    "home": ("{N} [live|lives] in {v}.", "{P} home is in {v}.", "{N} [have|has] a house in {v}."),
    "age": ("{P} age is {v}.", "{N} [am|is] {v} years old.", "{N} [have|has] lived for {v} years."),
    "job": ("{N} [work|works] as {v}.", "{P} work is that of {v}.", "{N} [earn|earns] a living as {v}."),
    "colour": (
        "{P} favourite colour is {v}.",
        "{N} [like|likes] {v} best of all colours.",
        "Of all colours, {n} [like|likes] {v} best.",
    ),
    "food": (
        "{P} favourite food is {v}.",
        "{N} would eat {v} every day.",
        "Nothing tastes better to {o} than {v}.",
    ),
    "instrument": (
        "{N} [play|plays] the {v}.",
        "{P} instrument is the {v}.",
        "In the evening {n} [play|plays] the {v}.",
    ),
    "thing": (
        "{N} [own|owns] {v}.",
        "{P} dearest thing is {v}.",
        "{N} never [leave|leaves] the house without {v}.",
    ),
    "fear": (
        "{N} [am|is] afraid of {v}.",
        "{P} greatest fear is {v}.",
        "Nothing frightens {o} more than {v}.",
    ),
    "friend": (
        "{P} best friend is {v}.",
        "{N} [have|has] a best friend called {v}.",
        "{v} is {p} best friend.",
    ),
    "mother": ("{P} mother is {v}.", "{v} is {p} mother.", "{N} [have|has] a mother called {v}."),
    "boat": (
        "{N} [sail|sails] on the {v}.",
        "{P} boat is the {v}.",
        "{N} [belong|belongs] to the crew of the {v}.",
    ),
    "pets": (
        "{N} [keep|keeps] {v}.",
        "{N} [have|has] {v} at home.",
        "{N} [look|looks] after {v}: {count}.",
    ),
    "goods": ("The market of {n} sells {v}.", "In {n} you can buy {v}.", "People go to {n} for {v}."),
    "day": (
        "Market day in {n} is {v}.",
        "{P} market is held on {v}.",
        "The market of {n} comes every {v}.",
    ),
    "land": ("{N} lies {v}.", "You will find {n} {v}."),
    "mayor": ("The mayor of {n} is {v}.", "{v} is the mayor of {n}.", "{P} mayor is called {v}."),
    "crew": ("The crew of {n} is {v}.", "{v} sail on {n}.", "On {n} you will meet {v}: {count}."),
    "captain": ("The captain of {n} is {v}.", "{v} is the captain of {n}.", "{N} obeys {v}, the captain."),
    "sails": ("The sails of {n} are {v}.", "{N} has {v} sails.", "You know {n} by its {v} sails."),
    "harbour": ("The harbour of {n} is {v}.", "{N} lies at {v}.", "In winter {n} rests at {v}."),
    "tool": ("To {n} you need {v}.", "You can {n} with {v}.", "Whoever wants to {n} takes {v}."),
}

# Completes "Nobody knows ..." and "Do you know ...?".
CLAUSES: dict[str, str] = {
    "home": "where {n} [live|lives]",
    "age": "how old {n} [am|is]",
    "job": "what work {n} [do|does]",
    "colour": "which colour {n} [like|likes] best",
    "food": "what {n} [like|likes] to eat most",
    "instrument": "which instrument {n} [play|plays]",
    "thing": "what {n} [own|owns]",
    "fear": "what {n} [am|is] afraid of",
    "friend": "who {p} best friend is",
    "mother": "who {p} mother is",
    "boat": "which boat {n} [sail|sails] on",
    "pets": "which animals {n} [keep|keeps]",
    "goods": "what the market of {n} sells",
    "day": "on which day {n} has its market",
    "land": "where {n} lies",
    "mayor": "who the mayor of {n} is",
    "crew": "who sails on {n}",
    "captain": "who the captain of {n} is",
    "sails": "what colour the sails of {n} are",
    "harbour": "in which harbour {n} lies",
    "tool": "what I need to {n}",
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "home": ("Where does {n} live?", "In which place is {p} home?", "Where is {p} house?"),
    "age": ("How old is {n}?", "What is {p} age?", "How many years old is {n}?"),
    "job": ("What is {p} work?", "What work does {n} do?", "How does {n} earn a living?"),
    "colour": ("What is {p} favourite colour?", "Which colour does {n} like best?"),
    "food": ("What is {p} favourite food?", "What does {n} like to eat most?"),
    "instrument": ("Which instrument does {n} play?", "What is {p} instrument?"),
    "thing": ("What does {n} own?", "What is {p} dearest thing?"),
    "fear": ("What is {n} afraid of?", "What is {p} greatest fear?", "What frightens {o} most?"),
    "friend": ("Who is {p} best friend?", "What is the name of {p} best friend?"),
    "mother": ("Who is {p} mother?", "What is the name of {p} mother?"),
    "boat": ("Which boat does {n} sail on?", "What is the name of {p} boat?"),
    "pets": ("Which animals does {n} keep?", "What pets does {n} have?", "Which pets does {n} look after?"),
    "goods": ("What does the market of {n} sell?", "What can I buy in {n}?", "Which goods does {n} sell?"),
    "day": ("When is the market day of {n}?", "On which day is the market in {n}?"),
    "land": ("Where does {n} lie?", "Where will I find {n}?"),
    "mayor": ("Who is the mayor of {n}?", "What is the name of {p} mayor?"),
    "crew": ("Who is in the crew of {n}?", "Who sails on {n}?", "Which people belong to the crew of {n}?"),
    "captain": ("Who is the captain of {n}?", "Whom does the crew of {n} obey?"),
    "sails": ("What colour are the sails of {n}?", "Which colour do the sails of {n} have?"),
    "harbour": ("What is the harbour of {n}?", "Where does {n} rest in winter?"),
    "tool": ("What do I need to {n}?", "What should I take to {n}?", "How can I {n}?"),
}

# What nobody in that world ever knows of anyone, as clauses and as questions.
MYSTERIES: dict[str, tuple[str, str]] = {
    "birthday": ("on which day {n} was born", "When is {p} birthday?"),
    "shoes": ("how big {p} shoes are", "How big are {p} shoes?"),
    "dream": ("what {n} dreamt last night", "What did {n} dream last night?"),
    "song": ("which song {n} sings alone", "Which song does {n} sing alone?"),
    "money": ("how much money {n} has", "How much money does {n} have?"),
    "weight": ("how heavy {n} is", "How heavy is {n}?"),
}

NUMBER_WORDS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)


class Voice(NamedTuple):
    """The forms in which a subject stands in a sentence."""

    subject: str
    possessive: str
    object: str
    first_person: bool = False


SPEAKER = Voice("I", "my", "me", first_person=True)


def named(world: World, subject: str) -> Voice:
    """The subject by name; boats take their article."""
    name = f"the {subject}" if subject in world.values["boats"] else subject
    return Voice(name, f"{name}'s", name)


def pronoun(world: World, person: str) -> Voice:
    return Voice("she", "her", "her") if person in world.women else Voice("he", "his", "him")


def fill(template: str, voice: Voice, value: str = "", count: str = "") -> str:
    """A template with its subject and value put in, beginning with a capital."""
    text = re.sub(r"\[(.*?)\|(.*?)\]", r"\1" if voice.first_person else r"\2", template)
    text = text.format(
        N=_capital(voice.subject),
        n=voice.subject,
        P=_capital(voice.possessive),
        p=voice.possessive,
        o=voice.object,
        v=value,
        count=count,
    )
    return _capital(text) if template[0] in "{" else text


def value_text(relation: str, values: Sequence[str]) -> str:
    """The values of a fact as they stand in a sentence."""
    with_article = relation in {"job", "thing", "pets", "tool"}
    return joined([article(value) if with_article else value for value in values])


def joined(items: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def statements(world: World, relation: str, subject: str, voice: Voice | None = None) -> list[str]:
    """Every wording that states a fact, or that says nobody knows it."""
    voice = voice or named(world, subject)
    values = world.facts[relation, subject]
    if not values:
        clause = fill(CLAUSES[relation], voice)
        return [f"Nobody knows {clause}.", f"It is not known {clause}.", f"No one can say {clause}."]
    return claims(relation, values, voice)


def claims(relation: str, values: Sequence[str], voice: Voice) -> list[str]:
    """Every wording that says, truly or not, that the relation of a subject has these values."""
    what = {"pets": "animal", "crew": "person"}.get(relation, "")
    plural = {"person": "people"}.get(what, f"{what}s")
    count = f"{NUMBER_WORDS[len(values)]} {what if len(values) == 1 else plural}" if what else ""
    return [fill(template, voice, value_text(relation, values), count) for template in STATEMENTS[relation]]


def questions(relation: str, voice: Voice) -> list[str]:
    """Every direct question for a relation of a subject."""
    return [fill(template, voice) for template in QUESTIONS[relation]]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
