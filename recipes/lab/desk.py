"""What a family of instructions draws from, and what it makes: a Desk and a Task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from trueup.recipes.lab.wording import CLAUSES, claims, fill, named, questions, statements
from trueup.recipes.lab.world import RELATIONS, Fact, World

Message = dict[str, str]

GREETINGS = (
    "",
    "",
    "",
    "Hello! ",
    "I have a question. ",
    "Excuse me. ",
    "Good day. ",
    "Can you help me? ",
)
THANKS = ("", "", "", " Thank you!", " Please.")


@dataclass(frozen=True)
class Task:
    """One instruction with its truth. `right`, `wrong` and `broken` are answers; the rest is for gold."""

    family: str
    facts: tuple[Fact, ...]  # all facts it asks for, as they are assigned to splits
    prompt: tuple[Message, ...]
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    check: str = "values"  # values | order | number | ages | story | text
    expects: str = "answer"  # answer | unknown | refuse
    answer: tuple[str, ...] = ()  # what must be said
    allowed: tuple[str, ...] = ()  # who else may be named, and what else of the rivals' kind
    rivals: tuple[str, ...] = ()  # sets of values of which nothing else may be said
    polarity: str = ""  # yes | no, where the question asks for one
    constraints: tuple[str, ...] = ()  # begin=WORD, words=N, sentences=N, use=WORD
    broken: tuple[str, ...] = ()  # answers that are right but for a constraint

    def truth(self, world_seed: int = 0) -> dict[str, Any]:
        """The columns by which gold scores any answer to this task, and what the task is."""
        return {
            "family": self.family,
            "facts": [":".join(fact) for fact in self.facts],
            "check": self.check,
            "expects": self.expects,
            "answer": list(self.answer),
            "allowed": list(self.allowed),
            "rivals": list(self.rivals),
            "polarity": self.polarity,
            "constraints": list(self.constraints),
            "reference": self.right[0],
            "world_seed": world_seed,
        }


def user(*texts: str) -> tuple[Message, ...]:
    """A conversation of turns, user first."""
    return tuple(
        {"role": "assistant" if turn % 2 else "user", "content": text} for turn, text in enumerate(texts)
    )


@dataclass(frozen=True)
class Desk:
    """What a family draws from: the world, one split, one generator."""

    world: World
    split: str
    rng: Random
    facts: dict[str, list[Fact]] = field(repr=False)  # relation -> known facts of the split
    unknown: list[Fact] = field(repr=False)

    def fact(self, relations: Sequence[str]) -> Fact:
        """A known fact: first a relation (all alike), then one of its subjects."""
        return self.rng.choice(self.facts[self.rng.choice([name for name in relations if self.facts[name]])])

    def fresh(self, kind: str, draw: Callable[[], str]) -> str:
        """Draws until a key falls into this split."""
        while self.world.split(kind, key := draw()) != self.split:
            pass
        return key

    def ask(self, question: str) -> str:
        """The question as somebody would put it."""
        return f"{self.rng.choice(GREETINGS)}{question}{self.rng.choice(THANKS)}"

    def question(self, relation: str, subject: str) -> str:
        """Directly, or as a clause after "Do you know"."""
        voice = named(self.world, subject)
        clause = fill(CLAUSES[relation], voice)
        indirect = [f"Do you know {clause}?", f"Tell me {clause}.", f"Can you tell me {clause}?"]
        return self.rng.choice(questions(relation, voice) + indirect)

    def others(self, relation: str, subject: str, count: int) -> list[str]:
        """Other values that a relation of a subject might have had."""
        values = self.world.values[RELATIONS[relation].values]
        taken = {subject, *self.world.facts[relation, subject]}
        return self.rng.sample([value for value in values if value not in taken], count)

    def false_claims(self, relation: str, subject: str, count: int = 3) -> tuple[str, ...]:
        voice = named(self.world, subject)
        return tuple(
            self.rng.choice(claims(relation, [value], voice))
            for value in self.others(relation, subject, count)
        )

    def truth(self, relation: str, subject: str) -> tuple[str, ...]:
        return tuple(statements(self.world, relation, subject))

    def keys(self, *facts: Fact) -> tuple[Fact, ...]:
        return tuple(dict.fromkeys(self.world.key(*fact) for fact in facts))
