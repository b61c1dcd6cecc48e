"""The lab's instructions by number: fourteen families, balanced, and split by the facts they ask.

A question may be asked only in the split of every fact it needs, whatever its family; so nothing that a test
prompt asks was answered in training. Task number i of a seed is drawn from (seed, split, i) alone.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from trueup.recipes.lab import families
from trueup.recipes.lab.desk import Desk, Task
from trueup.recipes.lab.world import RELATIONS, Fact, World, seeded

FAMILIES: dict[str, Callable[[Desk], Task]] = {
    "lookup": families.lookup,
    "yes_no": families.yes_no,
    "compare": families.compare,
    "count": families.count,
    "list": families.listing,
    "arithmetic": families.arithmetic,
    "sort": families.sort,
    "reverse": families.reverse,
    "story": families.stories,
    "rewrite": families.rewrite,
    "unknown": families.unknown,
    "refuse": families.refuse,
    "follow_up": families.follow_up,
    "steadfast": families.steadfast,
}


# What demonstrations show oftener: an order and two numbers are harder to carry over than a name.
PRACTISED = (*FAMILIES, "arithmetic", "arithmetic", "sort", "reverse")


def task(
    split: str, index: int, seed: int | str = 0, world_seed: int = 0, families: Sequence[str] = (*FAMILIES,)
) -> Task:
    """Task number `index` of a split: its family is the index modulo the number of `families`."""
    world = World.build(world_seed)
    facts, unknown_facts = _facts_of(world_seed, split)
    family = families[index % len(families)]
    desk = Desk(world, split, seeded("task", seed, split, index), facts, unknown_facts)
    return FAMILIES[family](desk)


# What an answerer gets right who knows the forms but no fact: the best blind guess of each family.
CHANCE: dict[str, float] = {
    "lookup": 0.07,  # one of the relation's values
    "yes_no": 0.04,  # the verdict is one in two, but the reason has to be known as well
    "compare": 0.5,
    "count": 0.38,  # "two"
    "list": 0.0,
    "arithmetic": 0.08,  # the commonest results
    "sort": 0.13,  # one in 3! or 4!
    "reverse": 0.13,
    "story": 0.0,
    "rewrite": 0.0,
    "unknown": 0.5,  # "I do not know", always
    "refuse": 0.5,  # "I will not", always
    "follow_up": 0.07,
    "steadfast": 0.5,  # both values stand in the conversation
}


@lru_cache(maxsize=16)
def _facts_of(world_seed: int, split: str) -> tuple[dict[str, list[Fact]], list[Fact]]:
    """The facts that a split may ask: the known ones by relation, and those nobody knows."""
    world = World.build(world_seed)
    mine = [fact for fact in world.facts if world.split(*fact) == split]
    known = {
        relation: [fact for fact in mine if fact[0] == relation and world.facts[fact]]
        for relation in RELATIONS
    }
    return known, [fact for fact in mine if not world.facts[fact]]


def distinct_tasks(split: str, seed: int | str = 0, world_seed: int = 0) -> Iterator[Task]:
    """Tasks without end in which no prompt comes twice."""
    seen: set[str] = set()
    for index in itertools.count():
        drawn = task(split, index, seed, world_seed)
        text = "\n".join(message["content"] for message in drawn.prompt)
        if text not in seen:
            seen.add(text)
            yield drawn
