"""The lab's data sets by name, as rows: what a recipe means by `dataset_name: lab/chat`.

Everything is drawn from seeds, so a data set is the same in every process, and needs no file and no network.
"""

import difflib
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from trueup.recipes.errors import UsageError
from trueup.recipes.lab.demonstrations import ERRING_SHARE, demonstration
from trueup.recipes.lab.desk import Task
from trueup.recipes.lab.preferences import pair
from trueup.recipes.lab.tasks import FAMILIES, PRACTISED, distinct_tasks, task
from trueup.recipes.lab.text import documents as all_documents
from trueup.recipes.lab.wording import STATEMENTS, fill, named, questions, value_text
from trueup.recipes.lab.world import RELATIONS, SPLITS, World, seeded

Row = dict[str, Any]


def _text(
    split: str,
    documents: int | None = None,
    megabytes: float | int | None = None,
    seed: int = 0,
    world_seed: int = 0,
) -> Iterator[Row]:
    """{text}: by number of documents or by size (1 MB is 10^6 bytes); 25 MB of training, 2,000 held out."""
    if documents is None and megabytes is None:
        documents, megabytes = (None, 25.0) if split == "train" else (2000, None)
    written = 0.0
    for text in itertools.islice(all_documents(split, seed, world_seed), documents):
        if megabytes is not None and written >= megabytes * 1e6:
            return
        written += len(text.encode())
        yield {"text": text}


def _chat(
    split: str,
    rows: int | None = None,
    seed: int = 0,
    errors: float | int = ERRING_SHARE,
    style: str = "mixed",
    world_seed: int = 0,
) -> Iterator[Row]:
    """{messages, truth columns} for SFT.

    A share `errors` of the answers is wrong, unsafe or breaks a constraint; style "clean" leaves out the few
    with a blemish of style.
    """
    count = rows if rows is not None else {"train": 50_000}.get(split, 1_000)
    drawn_tasks = _tasks(split, f"chat {seed}", world_seed, PRACTISED)
    for index, drawn in enumerate(itertools.islice(drawn_tasks, count)):
        rng = seeded("answer", seed, split, index)
        answer = demonstration(drawn, split, rng, errors, style, world_seed)
        yield {"messages": [*drawn.prompt, _answer(answer)]} | drawn.truth(world_seed)


def _prompts(split: str, rows: int | None = None, seed: int = 0, world_seed: int = 0) -> Iterator[Row]:
    """{prompt, truth columns}, no prompt twice: for PPO, RLOO, GRPO and every verdict."""
    count = rows if rows is not None else {"train": 8_000, "validation": 980, "test": 1_680}[split]
    for drawn in itertools.islice(distinct_tasks(split, f"prompts {seed}", world_seed), count):
        yield {"prompt": list(drawn.prompt)} | drawn.truth(world_seed)


def _preferences(
    split: str,
    rows: int | None = None,
    seed: int = 0,
    temperature: float = 0.15,
    flip: float = 0.1,
    world_seed: int = 0,
) -> Iterator[Row]:
    """{prompt, chosen, rejected, what the labeller knew, truth columns}."""
    count = rows if rows is not None else {"train": 10_000, "validation": 1_000, "test": 2_000}[split]
    for index in range(count):
        drawn = pair(split, index, seed, temperature, flip, world_seed)
        yield {
            "prompt": list(drawn.task.prompt),
            "chosen": [_answer(drawn.chosen)],
            "rejected": [_answer(drawn.rejected)],
            "gold_chosen": drawn.gold_chosen,
            "gold_rejected": drawn.gold_rejected,
            "p_label": drawn.p_label,
            "differs": list(drawn.differs),
        } | drawn.task.truth(world_seed)


def _facts(
    split: str, rows: int | None = None, choices: int = 4, seed: int = 0, world_seed: int = 0
) -> Iterator[Row]:
    """{question, context, choices, gold, relation, subject} for lm-eval: every single-valued fact of a split,
    as a question and as a sentence to be completed."""
    world = World.build(world_seed)
    rng = seeded("facts", seed, split)
    asked = [
        fact
        for fact, values in world.facts.items()
        if values and not RELATIONS[fact[0]].many and world.split(*fact) == split
    ]
    rng.shuffle(asked)
    for relation, subject in asked[:rows]:
        (value,) = world.facts[relation, subject]
        others = [
            other for other in world.values[RELATIONS[relation].values] if other not in (value, subject)
        ]
        offered = [value, *rng.sample(others, choices - 1)]
        rng.shuffle(offered)
        voice = named(world, subject)
        yield {
            "question": questions(relation, voice)[0],
            "context": fill(STATEMENTS[relation][0], voice, "|").split("|")[0].rstrip(),
            "choices": [value_text(relation, [one]) for one in offered],
            "gold": offered.index(value),
            "relation": relation,
            "subject": subject,
        }


def _tasks(split: str, seed: str, world_seed: int, practised: Sequence[str] = (*FAMILIES,)) -> Iterator[Task]:
    """Training may ask a thing in the same words again, and some families oftener; held-out sets may not."""
    if split != "train":
        return distinct_tasks(split, seed, world_seed)
    return (task(split, index, seed, world_seed, practised) for index in itertools.count())


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


_BUILDERS: dict[str, Callable[..., Iterator[Row]]] = {
    "lab/text": _text,
    "lab/chat": _chat,
    "lab/prompts": _prompts,
    "lab/preferences": _preferences,
    "lab/facts": _facts,
}
NAMES = tuple(_BUILDERS)


# What the arguments of the data sets must not be, and what to say then.
_RULES: tuple[tuple[Callable[[dict[str, Any]], bool], str], ...] = (
    (
        lambda a: None not in (a.get("documents"), a.get("megabytes")),
        "documents and megabytes exclude each other",
    ),
    (lambda a: a.get("style", "mixed") not in ("mixed", "clean"), "style must be 'mixed' or 'clean'"),
    (
        lambda a: not 0 <= a.get("errors", 0) < 0.5,
        "errors must be at least 0 and below 0.5: beyond, the commonest answer is a wrong one",
    ),
    (lambda a: a.get("temperature", 1) <= 0, "temperature must be above 0"),
    (
        lambda a: not 0 <= a.get("flip", 0) <= 0.5,
        "flip must lie between 0 and 0.5: labels turned more often only rename the better answer",
    ),
    (
        lambda a: not 2 <= a.get("choices", 2) <= 7,
        "choices must lie between 2 and 7: some relations have no more values",
    ),
    (
        lambda a: any(a.get(key) is not None and a[key] <= 0 for key in ("rows", "documents", "megabytes")),
        "rows, documents and megabytes must be above 0",
    ),
)


def rows(name: str, split: str, **kwargs: Any) -> Iterator[Row]:
    """The rows of a data set of the lab, JSON-serialisable, every column present in every row.

    Args:
        name: one of NAMES.
        split: train, validation or test; the facts asked, and the texts, are disjoint.
        kwargs: what the data set takes: `documents` or `megabytes` (lab/text), `rows` (the others),
            `errors` and `style` (lab/chat), `temperature` and `flip` (lab/preferences), `choices`
            (lab/facts); `seed` and `world_seed` everywhere.

    Raises:
        UsageError: for an unknown name, split or argument, naming the nearest right one. At once, not at the
            first row.
    """
    arguments = _resolved(name, split, kwargs)
    return _BUILDERS[name](split, **arguments)


def fingerprint(name: str, split: str, **kwargs: Any) -> str:
    """sha256 of all that the rows depend on: name, split, every argument, and the lab's own source."""
    arguments = _resolved(name, split, kwargs)
    described = json.dumps([name, split, arguments], sort_keys=True)
    return hashlib.sha256(described.encode() + _source_hash()).hexdigest()


def _resolved(name: str, split: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a data set with their values; raises UsageError for what it does not know."""
    _one_of("data set of the lab", name, NAMES)
    _one_of(f"split of {name}", split, SPLITS)
    parameters = [*inspect.signature(_BUILDERS[name]).parameters.values()][1:]
    for key in kwargs:
        _one_of(f"argument of {name}", key, [parameter.name for parameter in parameters])
    arguments = {parameter.name: kwargs.get(parameter.name, parameter.default) for parameter in parameters}
    types = get_type_hints(_BUILDERS[name])
    for key, value in kwargs.items():
        wanted = types[key] | int if types[key] is float else types[key]  # a whole number will do for a float
        if isinstance(value, bool) or not isinstance(value, wanted):
            described = getattr(types[key], "__name__", str(types[key]))
            raise UsageError(f"{name}: {key} is {value!r}; it must be of type {described}")
    for broken, rule in _RULES:
        if broken(arguments):
            raise UsageError(f"{name}: {rule}")
    return arguments


def _one_of(what: str, given: str, known: Any) -> None:
    if given not in known:
        nearest = difflib.get_close_matches(given, known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UsageError(f"{given!r} is no {what}.{hint} There are: {', '.join(known)}")


@cache
def _source_hash() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()
