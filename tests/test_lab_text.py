"""The lab's world and its text: one grammar writes and reads, so the entropy floor is exact."""

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueup.recipes.lab import exercises, story, text
from trueup.recipes.lab.grammar import END, NotInGrammar, Options, Pen, Reader, read, sample
from trueup.recipes.lab.wording import statements
from trueup.recipes.lab.world import RELATIONS, SPLIT_SHARES, World, seeded


@pytest.fixture(scope="module")
def world() -> World:
    return World.build(0)


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(itertools.islice(text.documents("train"), 70_000))


def test_options_that_cannot_be_read_back_are_refused() -> None:
    with pytest.raises(ValueError, match="'a cat' begins 'a cat and'"):
        Options(["a cat and", "a dog", "a cat"])


def coin_document(pen: Pen) -> None:
    coins = Options(["heads", "tails", "edge"], [0.5, 0.3, 0.2])
    used = [pen.choose(coins)]
    while pen.choose(Options([", ", END], [0.25, 0.75])) != END:
        used.append(pen.choose(coins, used))
        if len(used) == 3:
            return


def test_probabilities_of_all_texts_sum_to_one() -> None:
    """The reader's probabilities are a distribution: enumerated over every text this grammar can write."""
    names = ("heads", "tails", "edge")
    texts = [", ".join(order) for n in (1, 2, 3) for order in itertools.permutations(names, n)]
    assert math.fsum(2 ** -read(coin_document, one) for one in texts) == pytest.approx(1)
    assert read(coin_document, "tails, heads") == pytest.approx(-math.log2(0.3 * 0.25 * (0.5 / 0.7) * 0.75))


def test_reading_agrees_with_how_often_a_text_is_written() -> None:
    rng = seeded("coins")
    written = [sample(coin_document, rng) for _ in range(20_000)]
    for one in ("heads", "tails, heads", "edge, heads, tails"):
        assert written.count(one) / len(written) == pytest.approx(2 ** -read(coin_document, one), abs=0.01)


@pytest.mark.parametrize("wrong", ["", "heads, heads", "heads,", "heads, tails, edge, heads", "Heads"])
def test_texts_outside_the_grammar_are_not_read(wrong: str) -> None:
    with pytest.raises(NotInGrammar):
        read(coin_document, wrong)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**40), world_seed=st.integers(0, 3))
def test_every_document_reads_back_and_names_its_kind(seed: int, world_seed: int) -> None:
    library = text.library(world_seed)
    kinds: list[str] = []
    written = sample(lambda pen: kinds.append(library.write(pen)), seeded("read back", seed))
    kind, bits = text.bits(written, world_seed)
    assert kind == kinds[0]
    assert 10 < bits < 200


def test_a_changed_document_is_not_read() -> None:
    original = next(text.documents("train"))
    with pytest.raises(NotInGrammar):
        text.bits(original.replace(".", "!", 1))


def test_documents_are_the_same_in_another_process() -> None:
    code = "from trueup.recipes.lab import text; print(next(text.documents('test', seed=5)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other == next(text.documents("test", seed=5)) + "\n"


def test_reading_may_start_anywhere() -> None:
    whole = list(itertools.islice(text.documents("train", start=0), 300))
    later = list(itertools.islice(text.documents("train", start=100), 100))
    assert any(whole[offset : offset + 100] == later for offset in range(80, 101))


def test_no_held_out_document_stands_in_training(train: list[str]) -> None:
    for split in ("validation", "test"):
        held_out = list(itertools.islice(text.documents(split, seed=1), 300))
        assert len(set(held_out)) == len(held_out)
        assert not set(held_out) & set(train)
        assert {text.split_of(one) for one in held_out} == {split}


def test_documents_hardly_repeat(train: list[str]) -> None:
    assert len(set(train)) > 0.99 * len(train)


def test_every_fact_stands_in_the_text(train: list[str], world: World) -> None:
    body = "\n".join(train)
    for relation, subject in world.facts:
        if RELATIONS[relation].subject == "person":
            continue  # these stand with pronouns; a person's page is read below
        assert any(wording in body for wording in statements(world, relation, subject)), (relation, subject)
    for name, (what, where) in world.secrets.items():
        assert f"{name} hides {what} {where}." in body
    for expression, result in exercises.SUMS.items():
        assert f"Sum: {expression} = {result}\n" in body + "\n"
    assert all(name in body for name in world.strangers)
    pages = {name: "".join(one for one in train if f" {name}. " in one[:40]) for name in world.people}
    for name, page in pages.items():
        for relation, values in world.about(name).items():
            assert all(value in page for value in values), (relation, name)


def test_the_floor_is_the_mean_of_what_was_read(train: list[str]) -> None:
    floors = text.floors(train[:500])
    every = floors.pop("all")
    assert every.bits == pytest.approx(math.fsum(text.bits(one)[1] for one in train[:500]))
    assert every.documents == sum(floor.documents for floor in floors.values()) == 500
    assert every.bytes == sum(len(one.encode()) for one in train[:500])
    assert set(floors) == set(text.KINDS)
    assert 0.15 < every.bits_per_byte < 0.35


def test_facts_are_shared_out_among_the_splits_in_every_relation(world: World) -> None:
    for relation in RELATIONS:
        facts = [fact for fact in world.facts if fact[0] == relation]
        for split, share in SPLIT_SHARES.items():
            count = sum(world.split(*fact) == split for fact in facts)
            slack = 1 if relation != "boat" else 2 * 4  # a boat's whole crew goes together
            assert abs(count - share * len(facts)) <= slack, (relation, split)


def test_a_boat_is_asked_only_where_its_crew_is(world: World) -> None:
    for name in world.people:
        (boat,) = world.facts["boat", name]
        assert world.split("boat", name) == world.split("crew", boat)


@pytest.mark.parametrize("seed", range(12))
def test_worlds_are_sound(seed: int) -> None:
    built = World.build(seed)
    assert len(built.people) == len(set(built.people)) == 80
    assert not set(built.people) & set(built.strangers)
    for (relation, subject), values in built.facts.items():
        assert set(values) <= set(built.values[RELATIONS[relation].values]), (relation, subject)
        assert subject not in values
    for name in built.people:
        for mother in built.facts.get(("mother", name), ()):
            assert mother in built.women
    text.library(seed)


def test_composed_stories_are_stories_with_their_words_and_length(world: World) -> None:
    rng = seeded("stories")
    for _ in range(200):
        person = rng.choice(world.people)
        words = rng.sample([*story.SLOTS["thing"][:5], *story.SLOTS["animal"][:5]], 2)
        sentences = rng.randint(3, 4)
        told = story.compose(world, person, words, sentences, rng)
        assert story.is_story(world, person, told)
        assert all(word in told for word in words)
        assert told.count(".") == sentences
    assert not story.is_story(world, world.people[0], told)
    assert not story.is_story(world, person, told + " The end.")


def test_a_reader_reports_where_a_text_leaves_the_grammar() -> None:
    reader = Reader("heads and tails")
    with pytest.raises(NotInGrammar, match="character 5: ' and tails"):
        coin_document(reader)
