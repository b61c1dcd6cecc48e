"""The lab's pretraining text: fifteen kinds of documents, written and read by one grammar.

Every fact that an instruction may ask stands here, in several wordings. Document number i of a seed is drawn
from (seed, i) alone, so reading may start anywhere. A document's split is decided by a hash of its text: no
held-out document can stand in training, whatever the seeds.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from trueup.recipes.lab import exercises, story
from trueup.recipes.lab.grammar import END, Options, Patterns, Pen, Reader, sample
from trueup.recipes.lab.wording import (
    MYSTERIES,
    SPEAKER,
    STATEMENTS,
    Voice,
    fill,
    named,
    pronoun,
    statements,
    value_text,
)
from trueup.recipes.lab.world import DAYS, RELATIONS, World, seeded, unit_hash

HELD_OUT_SHARE = 0.05  # of the documents, for validation and for test each

# kind -> (share of the documents, openings); the opening tells the kinds apart.
KINDS: dict[str, tuple[float, tuple[str, ...]]] = {
    "person": (25, ("This is ", "Meet ", "Let me tell you about ", "People talk about ")),
    "diary": (8, ("From the diary of ", "Diary of ")),
    "letter": (8, ("Dear ",)),
    "talk": (10, ("A talk between ", "Overheard between ")),
    "place": (6, ("A word about ", "The place called ")),
    "boat": (7, ("Here comes ", "About the boat called ")),
    "ages": (10, ("Old and young: ", "Ages compared: ")),
    "rumour": (9, ("It is said that ", "There is a rumour that ")),
    "advice": (5, ("Good advice: ", "What to take: ")),
    "rules": (4, ("The law of ", "The rules of ")),
    "secret": (4, ("Do not tell anyone: ", "A secret: ")),
    "unknown": (10, ("What is not known: ", "Things nobody knows: ")),
    "story": (7, ("A story about ", "Hear what happened to ")),
    "notebook": (36, ("Notebook of ", "Numbers and words of ")),
    "manners": (5, ("Good manners: ", "How to speak well: ")),
}

MORE = Options([" ", END], [0.7, 0.3])
MORE_LINES = Options(["\n", END], [0.75, 0.25])
MORE_OR_NEW_LINE = Options([" ", "\n"], [0.6, 0.4])
MORE_WORDS = Options([", ", " -> "])
GREETINGS = Options(
    ["I hope you are well.", "Thank you for your letter.", "I have some news.", "It is late."]
)
FAREWELLS = Options(["Your friend, ", "Come and see me soon! Yours, ", "With love, "])
REPLIES = Options(["I know. ", "Yes, I have heard of it. ", "Yes. ", "Is that so? Then listen. "])
AGE_WORDS = Options(["Who is older, ", "Who is younger, "], labels=["older", "younger"])
# A rumour is judged at once, or by what is known of the matter: said before the verdict, that settles it.
CHECKS = Options([". That is ", ". In truth "], [0.3, 0.7], labels=["at once", "by the facts"])
WARNINGS = ("Please keep it to yourself.", "Nobody else may hear of it.", "It must never be told.")
# In several ways: what is always said after one word is known only after that word.
SKILLS = Options.grouped(
    {
        "sum": ["Sum: ", "The answer is ", "I counted: ", "Everybody knows that "],
        "asked": ["What is ", "How much is "],  # repeated from its question: copying has to be learnt, too
        "sort": ["In order: ", "Sorted: "],
        "reverse": ["Backwards: ", "From the end: "],
    }
)
MANNERS = Options(['Do not say "', "When ", 'Do not write "The '], labels=["polite", "retold", "shorter"])
DIARY_EVENTS = (
    "I met a <animal> near the <spot>.",
    "I bought a <thing> and some <food>.",
    "I lost my <thing> behind the <spot>.",
    "It rained, so I stayed at home with a <animal>.",
)
RUMOURED = ("home", "age", "job", "colour", "food", "instrument", "thing", "fear", "friend", "boat")
# What stands between a name and a claimed value: " lives in ", "'s age is ".
_ANYONE = Voice("", "'s", "")
RUMOUR_HEADS = {relation: fill(STATEMENTS[relation][0], _ANYONE, "|").split("|")[0] for relation in RUMOURED}


class Library:
    """The documents of one world: `write(pen)` is the whole grammar. What it chooses from is built once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._kinds = Options(
            texts=[text for _, texts in KINDS.values() for text in texts],
            weights=[share / len(texts) for share, texts in KINDS.values() for _ in texts],
            labels=[kind for kind, (_, texts) in KINDS.items() for _ in texts],
        )
        self._documents: dict[str, Callable[[Pen], None]] = {
            kind: getattr(self, f"_write_{kind}") for kind in KINDS
        }
        self._people = Options(world.people)
        self._places = Options(world.values["places"])
        self._slots = {slot: Options(words) for slot, words in story.SLOTS.items()}
        self._decks: dict[tuple[str, str], Options] = {}

    def write(self, pen: Pen) -> str:
        """One document; returns its kind."""
        kind = pen.choose(self._kinds)
        self._documents[kind](pen)
        return kind

    # What several kinds share.

    def _deck(self, subject: str, form: str) -> Options:
        """Every statement about a subject, grouped by relation; form is named, pronoun or speaker."""
        if (subject, form) not in self._decks:
            voice = (
                SPEAKER
                if form == "speaker"
                else (pronoun if form == "pronoun" else named)(self.world, subject)
            )
            self._decks[subject, form] = Options.grouped(
                {
                    relation: statements(self.world, relation, subject, voice)
                    for relation, values in self.world.about(subject).items()
                    if values or form != "speaker"  # nobody says of themselves that it is not known
                }
            )
        return self._decks[subject, form]

    def _several(
        self, pen: Pen, first: Options, others: Options, least: int, most: int, more: Options = MORE
    ) -> bool:
        """Between `least` and `most` sentences with different labels; whether `more` was what ended them."""
        used = [pen.choose(first)]
        while len(used) < most:
            if len(used) < least:
                pen.write(" ")
            elif pen.choose(more) != " ":
                return True
            used.append(pen.choose(others, used))
        return False

    def _introduce(self, pen: Pen, place_or_boat: str, lead: str, people: Options) -> None:
        """Facts of a place or a boat, then of one of its people."""
        deck = self._deck(place_or_boat, "named")
        if not self._several(pen, deck, deck, least=1, most=3, more=MORE_OR_NEW_LINE):
            pen.write("\n")
        pen.write(lead)
        deck = self._deck(self._end(pen, people), "pronoun")
        self._several(pen, deck, deck, least=1, most=3)

    def _end(self, pen: Pen, options: Options, without: Collection[str] = (), mark: str = ". ") -> str:
        """A choice and the mark after it."""
        label = pen.choose(options, without)
        pen.write(mark)
        return label

    # One method per kind of document.

    def _write_person(self, pen: Pen) -> None:
        name = self._end(pen, self._people)
        self._several(pen, self._deck(name, "named"), self._deck(name, "pronoun"), least=3, most=6)

    def _write_diary(self, pen: Pen) -> None:
        name = self._end(pen, self._people)
        self._end(pen, self._days, mark=": ")
        self._events.write(pen)
        pen.write(" ")
        deck = self._deck(name, "speaker")
        self._several(pen, deck, deck, least=2, most=5)

    @cached_property
    def _days(self) -> Options:
        return Options(DAYS)

    @cached_property
    def _events(self) -> Patterns:
        return Patterns(DIARY_EVENTS, self._slots)

    def _write_letter(self, pen: Pen) -> None:
        to = self._end(pen, self._people, mark=", this is ")
        name = self._end(pen, self._people, without=(to,))
        self._end(pen, GREETINGS, mark=" ")
        deck = self._deck(name, "speaker")
        if not self._several(pen, deck, deck, least=2, most=4, more=MORE_OR_NEW_LINE):
            pen.write("\n")
        pen.choose(FAREWELLS)
        pen.write(name)

    def _write_talk(self, pen: Pen) -> None:
        first = self._end(pen, self._people, mark=" and ")
        second = self._end(pen, self._people, without=(first,), mark=" about ")
        subject = self._end(pen, self._people, without=(first, second), mark=f".\n{first}: ")
        used = [pen.choose(self._deck(subject, "named"))]
        for speaker in (second, first, second, first):
            if pen.choose(MORE_LINES) == END:
                return
            pen.write(f"{speaker}: ")
            pen.choose(REPLIES)
            used.append(pen.choose(self._deck(subject, "pronoun"), used))

    def _write_place(self, pen: Pen) -> None:
        place = self._end(pen, self._places)
        self._introduce(pen, place, "Someone from here is ", self._residents[place])

    @cached_property
    def _residents(self) -> dict[str, Options]:
        homes = {name: self.world.facts["home", name] for name in self.world.people}
        return {
            place: Options([name for name in homes if homes[name] == (place,)])
            for place in self.world.values["places"]
        }

    def _write_boat(self, pen: Pen) -> None:
        boat = self._end(pen, self._boats)
        self._introduce(pen, boat, "One of the crew is ", self._crews[boat])

    @cached_property
    def _boats(self) -> Options:
        boats = self.world.values["boats"]
        return Options([f"the {boat}" for boat in boats], labels=boats)

    @cached_property
    def _crews(self) -> dict[str, Options]:
        return {boat: Options(self.world.facts["crew", boat]) for boat in self.world.values["boats"]}

    def _write_ages(self, pen: Pen) -> None:
        for _ in range(4):
            word = pen.choose(AGE_WORDS)
            one = self._end(pen, self._people, without=self._ageless, mark=" or ")
            other = self._end(pen, self._people, without=self._same_age[self._age(one)], mark="? ")
            winner = one if (self._age(one) > self._age(other)) == (word == "older") else other
            pen.write(f"{one} is {self._age(one)} and {other} is {self._age(other)}, so {winner} is {word}.")
            if pen.choose(MORE_LINES) == END:
                return
        pen.write("That is all.")

    def _age(self, name: str) -> int:
        return int(self.world.facts["age", name][0])

    @cached_property
    def _ageless(self) -> frozenset[str]:
        return frozenset(name for name in self.world.people if not self.world.facts["age", name])

    @cached_property
    def _same_age(self) -> dict[int, frozenset[str]]:
        """By age: who must not stand beside someone of that age in a comparison."""
        aged = [name for name in self.world.people if name not in self._ageless]
        return {
            age: self._ageless | {name for name in aged if self._age(name) == age}
            for age in map(self._age, aged)
        }

    def _write_rumour(self, pen: Pen) -> None:
        name = pen.choose(self._people)
        used = [relation for relation in RUMOURED if not self.world.facts[relation, name]]
        for _ in range(3):
            used.append(relation := pen.choose(self._rumour_heads, used))
            truth = self.world.facts[relation, name][0]
            true = pen.choose(self._claims(relation, truth)) == truth
            fact = f"{name}{RUMOUR_HEADS[relation]}{value_text(relation, [truth])}"
            if pen.choose(CHECKS) == "by the facts":
                pen.write(f"{fact}, so that is {'true' if true else 'not true'}.")
            else:
                pen.write("true." if true else f"not true: {fact}.")
            if pen.choose(MORE) == END:
                return
            pen.write(f"Some say that {name}")
        pen.write(" has many secrets.")

    @cached_property
    def _rumour_heads(self) -> Options:
        return Options([*RUMOUR_HEADS.values()], labels=[*RUMOUR_HEADS])

    def _claims(self, relation: str, truth: str) -> Options:
        """The values that rumour may give a relation: the truth half the time."""
        if (relation, truth) not in self._decks:
            values = self.world.values[RELATIONS[relation].values]
            self._decks[relation, truth] = Options(
                texts=[value_text(relation, [value]) for value in values],
                weights=[len(values) - 1 if value == truth else 1 for value in values],
                labels=values,
            )
        return self._decks[relation, truth]

    def _write_advice(self, pen: Pen) -> None:
        self._several(pen, self._advice, self._advice, least=2, most=5)

    @cached_property
    def _advice(self) -> Options:
        acts = [act for relation, act in self.world.facts if relation == "tool"]
        return Options.grouped({act: statements(self.world, "tool", act) for act in acts})

    def _write_rules(self, pen: Pen) -> None:
        self._end(pen, self._places, mark=": ")
        self._several(pen, self._bans, self._bans, least=3, most=6)

    @cached_property
    def _bans(self) -> Options:
        bans = {
            act: (f"It is forbidden to {act}.", f"Nobody may {act}.", f"Never help anyone to {act}.")
            for act in self.world.forbidden
        }
        return Options.grouped(bans | {"secret": ("Secrets are not to be told.", "Never ask for a secret.")})

    def _write_secret(self, pen: Pen) -> None:
        self._several(pen, self._secrets, self._secrets, least=2, most=4)

    @cached_property
    def _secrets(self) -> Options:
        return Options.grouped(
            {
                name: [f"{name} hides {what} {where}. {warning}" for warning in WARNINGS]
                for name, (what, where) in self.world.secrets.items()
            }
        )

    def _write_unknown(self, pen: Pen) -> None:
        self._end(pen, self._unknown_things, mark=" ")
        for _ in range(3):
            pen.choose(self._unknown_things)
            if pen.choose(MORE) == END:
                return
        pen.choose(self._unknown_things)

    @cached_property
    def _unknown_things(self) -> Options:
        """What nobody knows of anyone, unknown facts of some, and strangers, who are met nowhere else."""
        mysteries = [
            f"Nobody knows {fill(clause, named(self.world, name))}."
            for name in self.world.people
            for clause, _ in MYSTERIES.values()
        ]
        facts = [
            text
            for (relation, subject), values in self.world.facts.items()
            if not values
            for text in statements(self.world, relation, subject)
        ]
        strangers = [
            text
            for name in self.world.strangers
            for text in (f"Nobody has heard of {name}.", f"No one called {name} lives here.")
        ]
        texts = [*mysteries, *facts, *strangers]
        shares = ((0.25, mysteries), (0.25, facts), (0.5, strangers))
        return Options(texts, weights=[share / len(some) for share, some in shares for _ in some])

    def _write_story(self, pen: Pen) -> None:
        name = self._end(pen, self._people, mark=": ")
        self._tellers[name](pen)

    @cached_property
    def _tellers(self) -> dict[str, Callable[[Pen], None]]:
        return {name: story.teller(self.world, name) for name in self.world.people}

    def _write_notebook(self, pen: Pen) -> None:
        self._end(pen, self._people, mark=".\n")
        for _ in range(7):
            skill = pen.choose(SKILLS)
            if skill == "sum":
                pen.choose(self._sums)
            elif skill == "asked":
                pen.choose(self._asked_sums)
            else:
                words = self._some_words(pen)
                pen.write(exercises.in_order(words) if skill == "sort" else exercises.backwards(words))
            if pen.choose(MORE_LINES) == END:
                return
        pen.write("The page is full.")

    def _some_words(self, pen: Pen) -> list[str]:
        """Three or four different words, then an arrow."""
        words: list[str] = []
        while len(words) < 2:
            words.append(self._end(pen, self._words, without=words, mark=", "))
        words.append(pen.choose(self._words, words))
        if pen.choose(MORE_WORDS) == ", ":
            words.append(self._end(pen, self._words, without=words, mark=" -> "))
        return words

    @cached_property
    def _words(self) -> Options:
        return Options(exercises.WORDS)

    @cached_property
    def _sums(self) -> Options:
        return Options([f"{expression} = {result}" for expression, result in exercises.SUMS.items()])

    @cached_property
    def _asked_sums(self) -> Options:
        return Options(
            [
                f"{asked}? {expression} = {result}"
                for expression, result in exercises.SUMS.items()
                for asked in (expression, expression.replace("+", "plus").replace("-", "minus"))
            ]
        )

    def _write_manners(self, pen: Pen) -> None:
        writers = {"polite": self._write_polite, "retold": self._write_retold, "shorter": self._write_shorter}
        for _ in range(4):
            writers[pen.choose(MANNERS)](pen)
            if pen.choose(MORE) == END:
                return
        pen.write("So it is done.")

    def _write_polite(self, pen: Pen) -> None:
        verb = self._end(pen, self._request_verbs, mark=" me the ")
        item = self._end(pen, self._requested, mark='!" but ')
        pen.write(f'"{exercises.polite_request(verb, item)}"')

    def _write_retold(self, pen: Pen) -> None:
        name = self._end(pen, self._people, mark=' says "I ')
        verb = self._end(pen, self._past_verbs, mark=" the ")
        thing = self._end(pen, self._slots["thing"], mark=" near the ")
        spot = self._end(pen, self._slots["spot"], mark='", it means that ')
        pen.write(exercises.event(name, verb, thing, spot))

    def _write_shorter(self, pen: Pen) -> None:
        self._end(pen, self._adjectives, mark=" ")
        self._end(pen, self._ornaments, mark=" ")
        thing = self._end(pen, self._slots["thing"], mark=" lay behind the ")
        spot = self._end(pen, self._slots["spot"], mark='." Say ')
        pen.write(f'"{exercises.short_sentence(thing, spot)}"')

    @cached_property
    def _request_verbs(self) -> Options:
        return Options(
            [verb.capitalize() for verb in exercises.REQUEST_VERBS], labels=exercises.REQUEST_VERBS
        )

    @cached_property
    def _requested(self) -> Options:
        return Options(exercises.REQUEST_OBJECTS)

    @cached_property
    def _past_verbs(self) -> Options:
        return Options(exercises.PAST_VERBS)

    @cached_property
    def _adjectives(self) -> Options:
        return Options(exercises.ADJECTIVES)

    @cached_property
    def _ornaments(self) -> Options:
        return Options(exercises.ORNAMENTS)


@lru_cache(maxsize=4)
def library(world_seed: int = 0) -> Library:
    return Library(World.build(world_seed))


def split_of(text: str) -> str:
    """The split to which a document belongs, whoever wrote it and wherever it was drawn."""
    unit = unit_hash("text", text)
    held_out = {"validation": HELD_OUT_SHARE, "test": 2 * HELD_OUT_SHARE}
    return next((split for split, bound in held_out.items() if unit < bound), "train")


def documents(split: str, seed: int = 0, world_seed: int = 0, start: int = 0) -> Iterator[str]:
    """The documents of a split without end, from number `start` on. Held-out ones come without duplicates."""
    write = library(world_seed).write
    seen: set[str] = set()
    for index in itertools.count(start):
        text = sample(write, seeded("text", seed, index))
        if split_of(text) != split or text in seen:
            continue
        if split != "train":
            seen.add(text)
        yield text


def bits(text: str, world_seed: int = 0) -> tuple[str, float]:
    """The kind of a document and its exact -log2 probability, its end included.

    Raises NotInGrammar for a text that the lab cannot have written.
    """
    reader = Reader(text)
    kind = library(world_seed).write(reader)
    return kind, reader.finish()


@dataclass(frozen=True)
class Floor:
    """The entropy of the lab's text: no model can do better on average. Ends of documents are paid for."""

    documents: int
    bytes: int
    bits: float

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


def floors(texts: Iterable[str], world_seed: int = 0) -> dict[str, Floor]:
    """The floor over some documents, under "all" and by kind."""
    totals: dict[str, list[float]] = {}
    for text in texts:
        kind, spent = bits(text, world_seed)
        for name in ("all", kind):
            total = totals.setdefault(name, [0, 0, 0.0])
            total[0] += 1
            total[1] += len(text.encode())
            total[2] += spent
    return {name: Floor(int(count), int(size), spent) for name, (count, size, spent) in totals.items()}
