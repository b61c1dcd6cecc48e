"""Whether a comparison is fair, as far as the records of its models tell.

Arms must have begun as the baseline, have learned from the same pairs and prompts, and be chosen among their
checkpoints by one rule; what ranks must not be what an arm was trained or chosen by; and the test prompts
must have stayed unseen. A record tells what a run read, by content hash. A foreign model has none: what it
learned from is then unknown, and said to be.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from trueup.eval.compare_samples import BASELINE, Arm, read_rows
from trueup.eval.frontier import FRONTIER
from trueup.recipes.directory import RECORD, ModelDirectory, read_json
from trueup.recipes.hub import file_beside, short_name
from trueup.recipes.run import NEUTRAL_KEYS

Record = dict[str, Any]

OFFLINE = ("dpo", "kto")  # stages whose data are the pairs themselves
REWARDS = ("reward_model_name_or_path", "reward_funcs")
_SEEDS = {"seed", "data_seed"}  # the keys in which the seeds of one arm may differ


@dataclass(frozen=True)
class Findings:
    """What is wrong with a comparison.

    Args:
        unequal: differences in what the arms learned from.
        void: arm -> why there can be no verdict on it.
        unknown: what the records do not tell.
    """

    unequal: list[str] = field(default_factory=list)
    void: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Origin:
    """What one model learned from: content hashes, empty where nothing tells.

    Args:
        start: the model it began as.
        pairs: the labelled pairs, directly or through its reward models.
        prompts: where the prompts of those pairs, or of its rollouts, came from.
    """

    start: str
    pairs: frozenset[str]
    prompts: frozenset[str]


def examine(
    arms: Sequence[Arm],
    ranking: str | ModelDirectory,
    proxies: Sequence[ModelDirectory],
    test_set: Record,
) -> Findings:
    """All that the records tell against a comparison.

    Args:
        ranking: the first scorer: a name, or a reward model.
        proxies: the reward models that choose for best-of-n.
        test_set: the fingerprint of the test prompts.
    """
    baseline = next(arm for arm in arms if arm.name == BASELINE).directory(0)
    named = [arm for arm in arms if arm.name != BASELINE and not arm.best_of]
    findings = Findings()
    origins = {arm.name: [origin_of(one) for one in arm.directories] for arm in named}
    if proxies and named:
        origins["best-of-n"] = [
            Origin(baseline.identity, _pairs_of_reward(one.lineage), frozenset()) for one in proxies
        ]
    for arm in named:
        findings.unequal.extend(_not_seeds_of_one(arm))
        for place, one in enumerate(arm.directories):
            if one.identity != baseline.identity:
                _compare_start(f"{arm.name}[{place}]", one, origins[arm.name][place], baseline, findings)
    for what in ("pairs", "prompts"):
        _compare_data(what, origins, findings)
    _compare_choice(named, findings)
    held = _pairs_of_reward(ranking.lineage) if isinstance(ranking, ModelDirectory) else frozenset()
    for arm in arms:
        reason = _void(arm, ranking, held, proxies if arm.best_of else [], test_set)
        if reason:
            findings.void[arm.name] = reason
    return findings


# ------------------------------------------------------------------------------------------------ same start


def origin_of(model: ModelDirectory) -> Origin:
    """What a model learned from, by its record."""
    record = model.record
    parents = record.get("parents", {})
    start = str(parents.get("model_name_or_path", {}).get("identity", ""))
    if record.get("stage") in OFFLINE:
        return Origin(start, _data_of(record), _prompts_of(record))
    rewards = [parents[role] for role in parents if role.partition("[")[0] in REWARDS]
    pairs = frozenset[str]().union(*(_pairs_of_reward(reward) for reward in rewards))
    return Origin(start, pairs, _hashes(record))


def _data_of(record: Record) -> frozenset[str]:
    """The data a run was trained on: directories that a stage wrote by identity, others by content."""
    written = _data_parents(record)
    return frozenset(str(one["identity"]) for one in written) if written else _hashes(record)


def _data_parents(record: Record) -> list[Record]:
    parents = record.get("parents", {})
    return [one for role, one in parents.items() if role.startswith(("dataset_name", "datasets["))]


def _hashes(record: Record) -> frozenset[str]:
    return frozenset(str(one["sha256"]) for one in record.get("data", []) if one.get("split") == "train")


def _pairs_of_reward(reward: Record) -> frozenset[str]:
    """The pairs of a reward model, from its lineage; or if those are no directory, from its record."""
    written = _data_parents(reward)
    if written:
        return frozenset(str(one["identity"]) for one in written)
    return _hashes(_record_at(reward))


def _prompts_of(record: Record) -> frozenset[str]:
    """Where the prompts of a run's pairs came from: what the pairs stage read, or the pairs themselves."""
    written = _data_parents(record)
    if not written:
        return _hashes(record)
    return frozenset[str]().union(*(_hashes(_record_at(one)) for one in written))


def _record_at(lineage: Record) -> Record:
    """The record of a parent, if it is still where it was; empty if not."""
    path = file_beside(str(lineage.get("path", "")), RECORD)
    found: Record = read_json(path) if path else {}
    return found if found.get("identity") == lineage.get("identity") else {}


def _not_seeds_of_one(arm: Arm) -> Iterator[str]:
    """Directories of an arm that are not seeds of one method."""
    first, *others = arm.directories
    seen = {first.identity: 0}
    for place, other in enumerate(others, start=1):
        if other.identity in seen:
            same = f"{arm.name}[{seen[other.identity]}]"
            yield f"{arm.name}[{place}] and {same} are the same model, not two seeds"
        seen.setdefault(other.identity, place)
        if different := _differing_keys(first.record, other.record):
            yield f"{arm.name}[{place}] is no seed of {arm.name}[0]: they differ in {', '.join(different)}"


def _differing_keys(one: Record, other: Record) -> list[str]:
    if not one or not other:
        return []
    if one.get("stage") != other.get("stage"):
        return ["stage"]
    mine, theirs = one.get("recipe", {}), other.get("recipe", {})
    free = NEUTRAL_KEYS | _SEEDS | {role.partition("[")[0] for role in one.get("parents", {})}
    return sorted(
        key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key) and key not in free
    )


def _compare_start(
    name: str, model: ModelDirectory, origin: Origin, baseline: ModelDirectory, findings: Findings
) -> None:
    if not origin.start:
        findings.unknown.append(f"{name} ({model.name}): no record of the model it began as")
    elif origin.start != baseline.identity:
        findings.unequal.append(
            f"{name} ({model.name}) began as {origin.start[:12]}, and the baseline {baseline.name} is "
            f"{baseline.identity[:12]}"
        )


def _compare_data(what: str, origins: Mapping[str, Sequence[Origin]], findings: Findings) -> None:
    """Arms repetition by repetition: each seed may have pairs of its own, if all arms share them."""
    known: dict[str, list[frozenset[str]]] = {}
    for name, models in origins.items():
        hashes = [getattr(one, what) for one in models]
        if all(hashes):
            known[name] = hashes
        elif name != "best-of-n":
            findings.unknown.append(f"{name}: no record of its {what}")
    names = list(known)
    for name in names[1:]:
        first, mine = known[names[0]], known[name]
        for place in range(max(len(first), len(mine))):
            if first[place % len(first)] != mine[place % len(mine)]:
                seed = f", seed {place}" if max(len(first), len(mine)) > 1 else ""
                findings.unequal.append(f"{names[0]} and {name} learned from other {what}{seed}")
                break


# ------------------------------------------------------------------------------------------------ the choice


@dataclass(frozen=True)
class Choice:
    """Which of a run's checkpoints was published.

    Args:
        rule: in words.
        candidates: how many evaluated checkpoints the rule chose from; 1 where it takes the last.
    """

    rule: str
    candidates: int

    @property
    def in_words(self) -> str:
        """the best checkpoint by eval_score of 10"""
        return f"{self.rule} of {self.candidates}" if self.candidates > 1 else self.rule


def choice_of(model: ModelDirectory) -> Choice | None:
    """How a model was chosen among its own checkpoints, by its record; None where there is none."""
    recipe = model.record.get("recipe")
    if not recipe:
        return None
    if not recipe.get("load_best_model_at_end"):
        return Choice("the last checkpoint", 1)
    metric = "eval_" + (recipe.get("metric_for_best_model") or "loss").removeprefix("eval_")
    path = model.path / FRONTIER
    lines = read_rows(path) if path.exists() else []
    steps = {line["step"] for line in lines if line["split"] == "validation" and line["step"] > 0}
    # A loss is each method's own: the best by one is not chosen as the best by another.
    own = f" of {model.record['stage']}" if metric == "eval_loss" else ""
    return Choice(f"the best checkpoint by {metric}{own}", max(len(steps), 1))


def _compare_choice(arms: Sequence[Arm], findings: Findings) -> None:
    """The best of more checkpoints is the better by luck alone."""
    known: dict[str, Choice] = {}
    for arm in arms:
        for place, model in enumerate(arm.directories):
            if (choice := choice_of(model)) is not None:
                known[f"{arm.name}[{place}]"] = choice
    for (one, first), (other, second) in pairwise(known.items()):
        if first != second:
            findings.unequal.append(f"{one} is {first.in_words}, and {other} {second.in_words}")


# ------------------------------------------------------------------------------------------------ no verdict


def _void(
    arm: Arm,
    ranking: str | ModelDirectory,
    held: frozenset[str],
    proxies: Sequence[ModelDirectory],
    test_set: Record,
) -> str:
    """Why there can be no verdict on an arm; empty if nothing tells against one."""
    identity = ranking.identity if isinstance(ranking, ModelDirectory) else None
    if any(one.identity == identity or held & _pairs_of_reward(one.lineage) for one in proxies):
        return "its answers were chosen by what ranks, or by a reward model trained on the same pairs"
    for model in arm.directories:
        for reason in (
            _trained_on(model, ranking, identity, held),
            _steered(model.record, ranking),
            _saw_test(model.record, test_set),
        ):
            if reason:
                return reason
    return ""


def _trained_on(
    model: ModelDirectory, ranking: str | ModelDirectory, identity: str | None, held: frozenset[str]
) -> str:
    """Whether what ranks is what the model was rewarded by, or knows no more than its own pairs."""
    recipe, parents = model.record.get("recipe", {}), model.record.get("parents", {})
    rewarded = {one.get("identity") for role, one in parents.items() if role.partition("[")[0] in REWARDS}
    if identity in rewarded or ranking in (recipe.get("reward_funcs") or []):
        return "it was trained on the very scorer that ranks: a proxy never ranks"
    if held & origin_of(model).pairs:
        return "the reward model that ranks was trained on the arm's own pairs: it is not held out"
    return ""


def _steered(record: Record, ranking: str | ModelDirectory) -> str:
    """Whether the scorer that ranks chose a checkpoint, or a guard that reads it ended the run."""
    recipe = record.get("recipe", {})
    if isinstance(ranking, ModelDirectory):
        name = short_name(ranking.name)
        read_first = record.get("parents", {}).get("scorers[0]", {}).get("identity") == ranking.identity
    else:
        name, read_first = Path(ranking).name, (recipe.get("scorers") or [])[:1] == [ranking]
    watched = (recipe.get("metric_for_best_model") or "").removeprefix("eval_")
    names = {f"scorers/{name}"} | ({"score"} if read_first else set())
    if recipe.get("load_best_model_at_end") and watched in names:
        return f"oracle: its checkpoint was chosen by what ranks (metric_for_best_model: eval_{watched})"
    intervened = recipe.get("on_alarm", "warn") != "warn" and record.get("metrics", {}).get("alarms", 1) > 0
    if intervened and read_first:
        return f"oracle: a guard that reads what ranks ended its training (on_alarm: {recipe['on_alarm']})"
    return ""


def _saw_test(record: Record, test_set: Record) -> str:
    """Whether the test prompts served for training or for choices."""
    for one in record.get("data", []):
        # Where a set is cut by hash its splits share the files, and the name of the split tells them apart.
        same = one.get("sha256") == test_set["sha256"] and (
            "shares" not in one or one.get("split") == test_set["split"]
        )
        if same and one.get("split") in ("train", "validation"):
            return f"it used the test prompts for {one['split']}"
    recipe = record.get("recipe", {})
    for use in ("train", "validation"):
        split = recipe.get(f"dataset_{use}_split")
        if recipe.get("dataset_name") == test_set["name"] and "shares" not in test_set and split == "test":
            return f"it used the test split for {use} (dataset_{use}_split: test)"
        for written in _data_parents(record):
            read = {one["split"]: one.get("sha256") for one in _record_at(written).get("data", [])}
            if split is not None and read.get(split) == test_set["sha256"]:
                return f"it used pairs drawn from the test prompts for {use} (dataset_{use}_split: {split})"
    return ""


# ------------------------------------------------------------------------------------------------ the tree


def tree(model: ModelDirectory) -> list[tuple[int, str, Record]]:
    """(depth, role, lineage) of a model and all that it came from, depth first."""

    def walk(depth: int, role: str, lineage: Record) -> Iterator[tuple[int, str, Record]]:
        yield depth, role, lineage
        for name, parent in lineage.get("parents", {}).items():
            yield from walk(depth + 1, name, parent)

    return list(walk(0, "", model.lineage))
