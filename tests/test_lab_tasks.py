"""The lab's instructions: families, splits that do not leak, answers that gold tells apart."""

import itertools
import json
from collections import Counter, defaultdict
from typing import Any

import pytest

from trueup.recipes.lab.desk import Task
from trueup.recipes.lab.gold import STYLE, SUBSTANCE, TRUTH_COLUMNS, WEIGHTS, gold_parts
from trueup.recipes.lab.tasks import CHANCE, FAMILIES, distinct_tasks, task
from trueup.recipes.lab.world import SPLITS, World

COUNTS = {"train": 7_000, "validation": 1_400, "test": 2_800}


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[Task]]:
    return {split: [task(split, index) for index in range(count)] for split, count in COUNTS.items()}


def parts_of(drawn: list[Task], answers: list[str]) -> dict[str, list[float]]:
    truths = [one.truth() for one in drawn]
    columns: dict[str, list[Any]] = {name: [truth[name] for truth in truths] for name in TRUTH_COLUMNS}
    return gold_parts([""] * len(answers), answers, **columns)


def test_families_are_many_and_balanced(tasks: dict[str, list[Task]]) -> None:
    assert len(FAMILIES) >= 10
    for drawn in tasks.values():
        assert set(Counter(one.family for one in drawn).values()) == {len(drawn) // len(FAMILIES)}


def test_no_fact_is_asked_in_two_splits_whatever_the_family(tasks: dict[str, list[Task]]) -> None:
    asked = {split: {fact for one in drawn for fact in one.facts} for split, drawn in tasks.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not asked[one] & asked[other]


def test_a_right_answer_gives_away_no_fact_of_another_split(tasks: dict[str, list[Task]]) -> None:
    """What a training answer says is a fact that was asked: read from the text, not from the key."""
    world = World.build(0)
    held_out = [
        fact
        for fact in world.facts
        if world.split(*fact) != "train" and fact[0] in ("home", "boat", "friend")
    ]
    answers = "\n".join(text for one in tasks["train"] for text in one.right if one.family != "story")
    for relation, subject in held_out:
        for value in world.facts[relation, subject]:
            said = {"home": "lives in", "boat": "sails on the", "friend": "has a best friend called"}[
                relation
            ]
            assert f"{subject} {said} {value}" not in answers


def test_every_asked_relation_is_asked_in_every_split(tasks: dict[str, list[Task]]) -> None:
    kinds = {split: {fact[0] for one in drawn for fact in one.facts} for split, drawn in tasks.items()}
    assert kinds["train"] == kinds["validation"] == kinds["test"]


@pytest.mark.parametrize(("split", "least"), [("test", 1_500), ("validation", 900)])
def test_held_out_prompts_are_many_distinct_and_not_in_training(
    split: str, least: int, tasks: dict[str, list[Task]]
) -> None:
    def text(one: Task) -> str:
        return json.dumps(one.prompt)

    held_out = list(itertools.islice(distinct_tasks(split), least))
    assert len({text(one) for one in held_out}) == least
    assert not {text(one) for one in held_out} & {text(one) for one in tasks["train"]}
    by_family = Counter(one.family for one in held_out)
    assert max(by_family.values()) < 1.4 * min(by_family.values())


def test_right_answers_have_full_marks(tasks: dict[str, list[Task]]) -> None:
    drawn, answers = zip(*[(one, text) for one in tasks["test"] for text in one.right], strict=True)
    parts = parts_of(list(drawn), list(answers))
    for name in WEIGHTS:
        failing = [text for text, mark in zip(answers, parts[name], strict=True) if not mark]
        assert not failing, (name, failing[:3])


def test_near_misses_are_wrong_or_unsafe(tasks: dict[str, list[Task]]) -> None:
    drawn, answers = zip(*[(one, text) for one in tasks["test"] for text in one.wrong], strict=True)
    parts = parts_of(list(drawn), list(answers))
    passing = [text for text, mark in zip(answers, parts["correct"], strict=True) if mark]
    assert not passing, passing[:3]
    unsafe = [one.expects for one, safe in zip(drawn, parts["safe"], strict=True) if not safe]
    assert unsafe
    assert set(unsafe) == {"refuse"}


def test_broken_constraints_break_only_the_constraint_and_style(tasks: dict[str, list[Task]]) -> None:
    drawn, answers = zip(*[(one, text) for one in tasks["test"] for text in one.broken], strict=True)
    parts = parts_of(list(drawn), list(answers))
    assert not any(parts["constraints"])
    assert all(parts["correct"])


def test_half_of_the_decisions_go_each_way(tasks: dict[str, list[Task]]) -> None:
    """Chance is one half for whoever always says yes, always refuses or never knows."""
    shares: dict[str, list[bool]] = defaultdict(list)
    for one in tasks["train"]:
        if one.family == "yes_no":
            shares["yes"].append(one.polarity == "yes")
        if one.family in ("unknown", "refuse"):
            shares[one.family].append(one.expects == one.family)
        if one.family == "compare":
            asked = one.prompt[0]["content"]
            shares["first"].append(asked.find(one.answer[0]) < asked.find(one.allowed[0]))
    for name, decisions in shares.items():
        assert sum(decisions) / len(decisions) == pytest.approx(0.5, abs=0.06), name


def test_conversations_alternate_and_end_with_the_user(tasks: dict[str, list[Task]]) -> None:
    for one in tasks["train"]:
        roles = [message["role"] for message in one.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert {len(one.prompt) for one in tasks["train"]} == {1, 3}


def test_tasks_do_not_depend_on_what_was_drawn_before() -> None:
    assert task("test", 1234, seed=3) == task("test", 1234, seed=3)
    assert task("test", 1234, seed=3) != task("test", 1234, seed=4)


def test_other_worlds_work_too() -> None:
    drawn = [task("test", index, world_seed=5) for index in range(280)]
    answers = [one.right[0] for one in drawn]
    columns: dict[str, list[Any]] = {n: [one.truth(5)[n] for one in drawn] for n in TRUTH_COLUMNS}
    parts = gold_parts(answers, answers, **columns)
    assert all(all(parts[name]) for name in SUBSTANCE + STYLE)


def blind_guess(one: Task, world: World) -> str:
    """The right form of an answer without any knowledge of the facts."""
    name = one.allowed[-1] if one.allowed else ""
    return {
        "yes_no": "Yes.",
        "compare": f"{one.allowed[0]} is older." if one.check == "ages" else "",
        "count": "It is two.",
        "arithmetic": "The answer is 11.",
        "unknown": "I am sorry, but I do not know.",
        "refuse": "I am sorry, but I will not tell that.",
        "lookup": f"{world.values[one.rivals[0]][3]}." if one.rivals else name,
        "steadfast": one.right[-1] if len(one.prompt[0]["content"]) % 2 else one.wrong[0],
        "sort": ", ".join(sorted(one.answer, key=lambda word: word[-1])) + ".",
    }.get(one.family, "I see.")


def test_blind_guesses_stay_at_the_stated_chance(tasks: dict[str, list[Task]]) -> None:
    assert set(CHANCE) == set(FAMILIES)
    world = World.build(0)
    drawn = tasks["train"]
    marks = parts_of(drawn, [blind_guess(one, world) for one in drawn])["correct"]
    got: dict[str, list[float]] = defaultdict(list)
    for one, mark in zip(drawn, marks, strict=True):
        got[one.family].append(mark)
    for family, correct in got.items():
        assert sum(correct) / len(correct) <= CHANCE[family] + 0.06, family
    for family in ("compare", "count", "unknown", "refuse"):
        assert sum(got[family]) / len(got[family]) == pytest.approx(CHANCE[family], abs=0.06), family
