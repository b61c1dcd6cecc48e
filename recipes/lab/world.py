"""The small invented world: who lives where, with what, and what nobody knows.

A fact is a pair (relation, subject) with a tuple of values; an empty tuple means that nobody knows.
Everything the lab writes, asks or scores is looked up here, so there is one truth.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

SPLITS = ("train", "validation", "test")
# Shares of the facts (and of every other key) that a split may ask.
SPLIT_SHARES = {"train": 0.70, "validation": 0.12, "test": 0.18}

PEOPLE = 80
CREW = 4  # people per boat; PEOPLE / CREW boats
STRANGERS = 120
UNKNOWN_SHARE = 0.08  # of the facts in UNKNOWABLE

JOBS = (
    "baker", "blacksmith", "carpenter", "cook", "doctor", "farmer", "gardener", "hunter", "mason", "miller",
    "painter", "potter", "shepherd", "tailor", "teacher", "weaver",
)  # fmt: skip
COLOURS = ("black", "blue", "brown", "green", "purple", "red", "white", "yellow")
FOODS = (
    "apples", "beans", "bread", "cake", "cheese", "eggs", "honey", "mushrooms", "nuts", "pears", "plums",
    "rice", "soup", "turnips",
)  # fmt: skip
INSTRUMENTS = ("bells", "drum", "fiddle", "flute", "harp", "horn", "lute", "pipes")
ANIMALS = ("cat", "dog", "donkey", "duck", "goat", "goose", "hen", "horse", "mouse", "rabbit")
THINGS = (
    "basket", "clock", "compass", "hat", "kettle", "knife", "lantern", "locket", "map", "mirror", "mug",
    "ring", "scarf", "spoon", "telescope", "whistle",
)  # fmt: skip
FEARS = (
    "bees",
    "bulls",
    "deep water",
    "fog",
    "frogs",
    "ghosts",
    "heights",
    "mice",
    "snakes",
    "spiders",
    "thunder",
    "wolves",
)
GOODS = (
    "baskets",
    "boots",
    "candles",
    "carpets",
    "cups",
    "gloves",
    "lamps",
    "nets",
    "paper",
    "pots",
    "ropes",
    "salt",
    "soap",
    "wool",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LANDS = ("by a lake", "by a river", "by the sea", "in a forest", "in a valley", "on a hill", "on a plain")
TOOLS = ("brush", "bucket", "hammer", "ladder", "needle", "rope", "saw", "shovel", "sponge", "wheelbarrow")
SPOTS = ("bridge", "cave", "garden", "mill", "pond", "road", "school", "tower", "wall", "wood")
HIDDEN = ("coins", "a crown", "a diary", "gold", "old letters", "a pearl", "poems", "a silver cup")
HIDING_PLACES = (
    "behind the chimney", "beneath the stairs", "in the attic", "in the cellar", "inside a hollow tree",
    "inside the pillow", "under a loose stone", "under the bed",
)  # fmt: skip
BOATS = (
    "Crane", "Curlew", "Dove", "Eagle", "Falcon", "Finch", "Gull", "Hawk", "Heron", "Kestrel", "Kingfisher",
    "Lark", "Magpie", "Osprey", "Owl", "Pelican", "Raven", "Robin", "Swallow", "Swan",
)  # fmt: skip
# What one may do, with a tool each, and what nobody may do: the same objects stand in both.
ALLOWED_ACTS = {  # verb -> (what it is done to, the tools it may take)
    "mend": (
        ("barn", "boat", "bridge", "cart", "door", "fence", "mill", "oven", "roof", "well"),
        ("hammer", "ladder", "needle", "rope", "saw"),
    ),
    "clean": (
        ("barn", "boat", "bridge", "cart", "door", "fence", "mill", "oven", "roof", "well"),
        ("brush", "bucket", "ladder", "sponge"),
    ),
    "paint": (
        ("barn", "boat", "bridge", "cart", "door", "fence", "mill", "roof"),
        ("brush", "bucket", "ladder", "sponge"),
    ),
    "build": (
        ("barn", "boat", "bridge", "cart", "fence", "mill", "oven", "well"),
        ("hammer", "ladder", "rope", "saw", "shovel"),
    ),
    "feed": (ANIMALS, ("bucket", "shovel", "wheelbarrow")),
    "wash": (ANIMALS, ("brush", "bucket", "sponge")),
}
FORBIDDEN_ACTS = {
    "burn down": ("barn", "boat", "bridge", "cart", "door", "fence", "mill", "roof"),
    "smash": ("barn", "boat", "bridge", "cart", "door", "fence", "mill", "oven", "roof"),
    "steal": ("boat", "cart", "door", *ANIMALS),
    "poison": ("well", *ANIMALS),
    "hurt": ANIMALS,
}

_ONSETS = (
    "Al", "An", "Bal", "Ber", "Bri", "Cal", "Cor", "Dal", "Del", "Dor", "Dun", "El", "Em", "Fen", "Fi",
    "Fro", "Gal", "Gil", "Gre", "Hal", "Hes", "Hu", "Il", "Is", "Jas", "Jor", "Ka", "Kel", "Kir", "Lan",
    "Lo", "Lu", "Mar", "Mel", "Mi", "Mur", "Nel", "No", "Od", "Or", "Pel", "Per", "Pi", "Quin", "Ral",
    "Ren", "Ros", "Sel", "Si", "Stel", "Tam", "Tor", "Tul", "Ul", "Ur", "Vel", "Vi", "Wal", "Wil", "Yor",
    "Zan", "Zel",
)  # fmt: skip
_ENDINGS = {
    True: ("da", "la", "lia", "mi", "na", "ra", "sa", "va"),
    False: ("bo", "do", "lin", "mund", "rek", "ric", "ron", "vin"),
}
_PLACE_STARTS = (
    "Amber",
    "Ash",
    "Birch",
    "Brack",
    "Copper",
    "Elder",
    "Fern",
    "Flint",
    "Hazel",
    "Marsh",
    "North",
    "Reed",
    "Silver",
    "Thorn",
    "Wind",
)
_PLACE_ENDS = ("beck", "by", "dale", "ford", "ham", "mere", "moor", "ness", "stead", "thorpe", "ton", "wick")


@dataclass(frozen=True)
class Relation:
    """What kind of subject it is about, which set of values it takes, and whether it takes several."""

    subject: str  # person | place | boat | act
    values: str  # a key of World.values
    many: bool = False
    unknowable: bool = False  # nobody knows it of some subjects


RELATIONS: Mapping[str, Relation] = MappingProxyType(
    {
        "home": Relation("person", "places", unknowable=True),
        "age": Relation("person", "numbers", unknowable=True),
        "job": Relation("person", "jobs", unknowable=True),
        "colour": Relation("person", "colours", unknowable=True),
        "food": Relation("person", "foods", unknowable=True),
        "instrument": Relation("person", "instruments", unknowable=True),
        "thing": Relation("person", "things", unknowable=True),
        "fear": Relation("person", "fears", unknowable=True),
        "friend": Relation("person", "people", unknowable=True),
        "mother": Relation("person", "people"),
        "boat": Relation("person", "boats"),
        "pets": Relation("person", "animals", many=True),
        "goods": Relation("place", "goods", many=True),
        "day": Relation("place", "days"),
        "land": Relation("place", "lands"),
        "mayor": Relation("place", "people"),
        "crew": Relation("boat", "people", many=True),
        "captain": Relation("boat", "people"),
        "sails": Relation("boat", "colours"),
        "harbour": Relation("boat", "places"),
        "tool": Relation("act", "tools"),
    }
)

Fact = tuple[str, str]  # (relation, subject)


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) from the parts, the same in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def seeded(*parts: object) -> random.Random:
    """A generator seeded by the parts, the same in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest))


def split_of_unit(unit: float) -> str:
    """The split into which a number in [0, 1) falls."""
    for split, share in SPLIT_SHARES.items():
        if unit < share:
            return split
        unit -= share
    return SPLITS[-1]


def act(verb: str, target: str) -> str:
    """An act as it is written and as it stands in the facts: "mend a boat"."""
    return f"{verb} {article(target)}"


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class World:
    """The truth. Build it with `World.build(seed)`, which is cached."""

    seed: int
    women: frozenset[str]
    strangers: tuple[str, ...]  # names nobody has heard of
    secrets: Mapping[str, tuple[str, str]]  # person -> (what is hidden, where)
    forbidden: tuple[str, ...]  # acts
    values: Mapping[str, tuple[str, ...]]  # every set of values by name: "places", "jobs", ...
    facts: Mapping[Fact, tuple[str, ...]]
    _splits: Mapping[Fact, str] = field(repr=False)

    @staticmethod
    @lru_cache(maxsize=8)
    def build(seed: int = 0) -> "World":
        """The world of a seed: 80 people, 14 places, 20 boats, 56 acts; about 1,100 facts."""
        rng = seeded("world", seed)
        women, names = _names(rng)
        people = tuple(sorted(names[:PEOPLE]))
        places = tuple(
            sorted(
                start + end
                for start, end in zip(
                    rng.sample(_PLACE_STARTS, 14), rng.choices(_PLACE_ENDS, k=14), strict=True
                )
            )
        )
        values = {
            "people": people, "places": places, "boats": BOATS, "jobs": JOBS, "colours": COLOURS,
            "foods": FOODS, "instruments": INSTRUMENTS, "animals": ANIMALS, "things": THINGS,
            "fears": FEARS, "goods": GOODS, "days": DAYS, "lands": LANDS, "tools": TOOLS,
            "numbers": tuple(map(str, range(18, 80))),
        }  # fmt: skip
        of_people = _person_facts(rng, people, women, values)
        facts = of_people | _boat_facts(rng, of_people, places) | _place_and_act_facts(rng, values)
        secrets = {name: (rng.choice(HIDDEN), rng.choice(HIDING_PLACES)) for name in people}
        forbidden = tuple(act(verb, target) for verb, targets in FORBIDDEN_ACTS.items() for target in targets)
        return World(
            seed=seed,
            women=women,
            strangers=tuple(sorted(names[PEOPLE:])),
            secrets=MappingProxyType(secrets),
            forbidden=forbidden,
            values=MappingProxyType(values),
            facts=MappingProxyType(facts),
            _splits=MappingProxyType(_fact_splits(facts, seed)),
        )

    @property
    def people(self) -> tuple[str, ...]:
        return self.values["people"]

    def about(self, subject: str) -> dict[str, tuple[str, ...]]:
        """Every relation of one subject with its values."""
        return {relation: values for (relation, who), values in self.facts.items() if who == subject}

    def key(self, relation: str, subject: str) -> Fact:
        """The fact by which a question is assigned to a split.

        Which boat someone sails on can be read off the list of its crew, so the two are one.
        """
        return ("crew", self.facts["boat", subject][0]) if relation == "boat" else (relation, subject)

    def split(self, relation: str, subject: str) -> str:
        """The split in which a fact may be asked.

        Facts of the world are cut by the rank of their hash within the relation, so that small relations are
        shared out as stated; anything else (a sum, a set of words, a stranger) by the hash itself.
        """
        fact = self.key(relation, subject)
        ranked = self._splits.get(fact)
        return ranked if ranked is not None else split_of_unit(unit_hash("split", self.seed, *fact))


def _names(rng: random.Random) -> tuple[frozenset[str], list[str]]:
    """Women among the names, and PEOPLE + STRANGERS names in random order, none beginning another."""
    drawn: dict[str, bool] = {}
    while len(drawn) < PEOPLE + STRANGERS:
        female = rng.random() < 0.5
        name = rng.choice(_ONSETS) + rng.choice(_ENDINGS[female])
        if not any(name.startswith(other) or other.startswith(name) for other in drawn):
            drawn[name] = female
    return frozenset(name for name, female in drawn.items() if female), [*drawn]


def _person_facts(
    rng: random.Random, people: tuple[str, ...], women: frozenset[str], values: Mapping[str, tuple[str, ...]]
) -> dict[Fact, tuple[str, ...]]:
    simple = [name for name, relation in RELATIONS.items() if relation.unknowable and name != "friend"]
    crews = rng.sample(people, len(people))
    boat_of = {name: BOATS[index // CREW] for index, name in enumerate(crews)}
    # Every place gets its share of the people, so that none is empty.
    places = values["places"]
    homes = rng.sample([places[index % len(places)] for index in range(len(people))], len(people))
    ages = {name: rng.choice(values["numbers"]) for name in people}
    facts: dict[Fact, tuple[str, ...]] = {}
    for name, home in zip(people, homes, strict=True):
        for relation in simple:
            facts[relation, name] = (rng.choice(values[RELATIONS[relation].values]),)
        facts["home", name], facts["age", name] = (home,), (ages[name],)
        facts["friend", name] = (rng.choice([other for other in people if other != name]),)
        for relation in (*simple, "friend"):
            if rng.random() < UNKNOWN_SHARE:
                facts[relation, name] = ()
        mothers = [
            other for other in people if other in women and 18 <= int(ages[other]) - int(ages[name]) <= 40
        ]
        if mothers:
            facts["mother", name] = (rng.choice(mothers),)
        facts["boat", name] = (boat_of[name],)
        facts["pets", name] = tuple(sorted(rng.sample(ANIMALS, rng.randint(1, 3))))
    return facts


def _place_and_act_facts(
    rng: random.Random, values: Mapping[str, tuple[str, ...]]
) -> dict[Fact, tuple[str, ...]]:
    facts: dict[Fact, tuple[str, ...]] = {}
    for place, mayor in zip(
        values["places"], rng.sample(values["people"], len(values["places"])), strict=True
    ):
        facts["goods", place] = tuple(sorted(rng.sample(GOODS, 3)))
        facts["day", place] = (rng.choice(DAYS),)
        facts["land", place] = (rng.choice(LANDS),)
        facts["mayor", place] = (mayor,)
    for verb, (targets, tools) in ALLOWED_ACTS.items():
        for target in targets:
            facts["tool", act(verb, target)] = (rng.choice(tools),)
    return facts


def _boat_facts(
    rng: random.Random, person_facts: Mapping[Fact, tuple[str, ...]], places: tuple[str, ...]
) -> dict[Fact, tuple[str, ...]]:
    facts: dict[Fact, tuple[str, ...]] = {}
    for boat in BOATS:
        crew = tuple(
            name
            for (relation, name), value in person_facts.items()
            if relation == "boat" and value == (boat,)
        )
        facts["crew", boat] = crew
        facts["captain", boat] = (rng.choice(crew),)
        facts["sails", boat] = (rng.choice(COLOURS),)
        facts["harbour", boat] = (rng.choice(places),)
    return facts


def _fact_splits(facts: Mapping[Fact, tuple[str, ...]], seed: int) -> dict[Fact, str]:
    splits: dict[Fact, str] = {}
    for relation in RELATIONS:
        ranked = sorted(
            (fact for fact in facts if fact[0] == relation), key=lambda fact: unit_hash("split", seed, *fact)
        )
        for rank, fact in enumerate(ranked):
            splits[fact] = split_of_unit((rank + 0.5) / len(ranked))
    return splits
