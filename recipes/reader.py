"""The recipe reader: one flat YAML file per stage, read strictly, every mistake told at once with its line.

Order of precedence: the stage's default < this machine's default < the file < the chosen budget < a flag.
Files are YAML 1.2, so `1e-4` is a number and `no` is text.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node

from trueup.recipes.errors import UsageError, nearest_path
from trueup.recipes.machine import machine_defaults
from trueup.recipes.retired import RETIRED, RETIRED_VALUES, Refused
from trueup.recipes.schema import BadValue, Key, fit, schema_of, show
from trueup.recipes.stages import STAGES, stage_class

# Keys every recipe may have beside its stage's own.
COMMON_KEYS = {
    "stage": "Which stage this recipe is for; implied by the verb when absent.",
    "budgets": "Named overrides, e.g. {smoke: {max_steps: 5}}, chosen with --budget smoke.",
}

SECRET_KEYS = {"hub_token"}


@dataclass(frozen=True)
class Entry:
    """One `key: value` and where it stands (`recipe.yaml:12`, or `--flag`)."""

    key: str
    value: Any
    place: str


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every key of its stage with a value, and where each value comes from."""

    stage: str
    values: dict[str, Any]
    origin: dict[str, str]  # key -> place; "default", or "this machine: <why>", where nobody wrote it
    source: Path | None = None
    notes: list[str] = field(default_factory=list)  # retired keys that were translated

    def build(self) -> Any:
        """The stage's dataclass with these values.

        Raises:
            UsageError: what the configs of TRL and Transformers find wrong by themselves.
        """
        try:
            return stage_class(self.stage)(**self.values)
        except (ValueError, TypeError, ImportError) as error:
            raise UsageError(f"{self.source or self.stage}: {error}") from error

    def public(self) -> dict[str, Any]:
        """The values as they may be stored and shown: no tokens."""
        return {key: "(hidden)" if key in SECRET_KEYS and v else v for key, v in self.values.items()}

    def written(self) -> dict[str, Any]:
        """The values somebody chose: all but the defaults."""
        return {key: value for key, value in self.values.items() if self.origin[key] != "default"}


class RecipeError(UsageError):
    """All that is wrong with a recipe, one line per mistake."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(problems))


def read_recipe(
    path: Path | str | None,
    stage: str | None = None,
    flags: Iterable[Entry] = (),
    budget: str | None = None,
) -> Recipe:
    """Read, check and resolve one recipe.

    Args:
        path: the YAML file; None if everything stands in the flags.
        stage: the verb; must agree with the file's `stage:`.
        flags: entries from the command line, which win.
        budget: one of the file's `budgets`.

    Raises:
        RecipeError: with every mistake found.
        UsageError: the file cannot be read at all.
    """
    source = Path(path) if path is not None else None
    entries = parse_yaml(source) if source else []
    stage = _stage_of(entries, stage, source)
    schema = schema_of(stage_class(stage))
    problems: list[str] = []
    notes: list[str] = []
    budgets = _budgets(entries, source, problems)
    layers = [[e for e in entries if e.key not in COMMON_KEYS]]
    layers += [overrides for name, overrides in budgets.items() if name == budget]
    if budget is not None and source is not None and budget not in budgets:
        known = f"it has {', '.join(budgets)}" if budgets else "it has none"
        problems.append(f"{source}: no budget '{budget}' ({known}); add it under budgets:")
    layers.append(list(flags))
    given: dict[str, Entry] = {}
    for layer in layers:
        given.update(check_entries(layer, schema, problems, notes))
    for name, overrides in budgets.items():  # the budgets not chosen are held to the same standard
        if name != budget:
            check_entries(overrides, schema, problems, [])
    problems += _missing(schema, given, source, stage)
    if problems:
        raise RecipeError(problems)
    if budget is not None:
        given = _own_place(given, budget)
    return _resolve(stage, schema, given, source, notes)


def _own_place(given: dict[str, Entry], budget: str) -> dict[str, Entry]:
    """Runs of a budget go beside the real ones: `runs/lab.smoke/sft` beside `runs/lab/sft`, parents alike.

    Raises:
        UsageError: `output_dir` has no folder of its own that could be renamed.
    """
    root = Path(str(given["output_dir"].value)).parent
    if not root.name:
        raise UsageError(f"{given['output_dir'].place}: with a budget, output_dir needs the form FOLDER/NAME")

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, dict):
            return {name: moved(item) for name, item in value.items()}
        if isinstance(value, str) and root in Path(value).parents:
            return str(root.with_name(f"{root.name}.{budget}") / Path(value).relative_to(root))
        return value

    return {key: Entry(key, moved(entry.value), entry.place) for key, entry in given.items()}


def _resolve(
    stage: str, schema: dict[str, Key], given: dict[str, Entry], source: Path | None, notes: list[str]
) -> Recipe:
    values = {name: key.default for name, key in schema.items()}
    origin = dict.fromkeys(schema, "default")
    for name, entry in given.items():
        values[name], origin[name] = entry.value, entry.place
    for name, (value, why) in machine_defaults(schema, {n: e.value for n, e in given.items()}).items():
        values[name], origin[name] = value, f"this machine: {why}"
    problems = []
    chosen = {name: entry.value for name, entry in given.items()}
    for name, message in stage_class(stage).contradictions(chosen):  # type: ignore[attr-defined]
        place = given[name].place if name in given else str(source or stage)
        problems.append(f"{place}: {name} {message}")
    if problems:
        raise RecipeError(problems)
    derive = getattr(stage_class(stage), "derived", None)
    for name, (value, why) in (derive(chosen) if derive else {}).items():
        values[name], origin[name] = value, f"derived: {why}"
    return Recipe(stage, values, origin, source, notes)


# ---------------------------------------------------------------- the file


def parse_yaml(path: Path) -> list[Entry]:
    """The entries of a flat YAML 1.2 file in order, duplicates included.

    Raises:
        UsageError: not there, not text, not YAML, or not a mapping; with the line where there is one.
    """
    text = _read_text(path)
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except YAMLError as error:
        raise UsageError(_yaml_message(path, error)) from error
    if root is None:
        raise UsageError(
            f"{path}: the file is empty; a recipe is `key: value` lines, see `trueup VERB --help`"
        )
    if not isinstance(root, MappingNode):
        raise UsageError(
            f"{path}:{root.start_mark.line + 1}: a recipe is `key: value` lines, not a {root.id}"
        )
    return _entries(yaml, root, path)


def _entries(yaml: YAML, mapping: Node, path: Path) -> list[Entry]:
    """The `key: value` lines of a mapping; those of each budget are entries too, with lines of their own."""
    if not isinstance(mapping, MappingNode):
        line = mapping.start_mark.line + 1
        raise UsageError(f"{path}:{line}: a budget is a mapping of overrides, e.g. smoke: {{max_steps: 5}}")
    entries = []
    for key_node, value_node in mapping.value:
        if key_node.value == "budgets" and isinstance(value_node, MappingNode):
            value: Any = {str(name.value): _entries(yaml, node, path) for name, node in value_node.value}
        else:
            value = _construct(yaml, value_node, path)
        entries.append(Entry(str(key_node.value), value, f"{path}:{key_node.start_mark.line + 1}"))
    return entries


def _construct(yaml: YAML, node: Node, path: Path) -> Any:
    try:
        return yaml.constructor.construct_object(node, deep=True)
    except YAMLError as error:
        raise UsageError(_yaml_message(path, error)) from error


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UsageError(
            f"{path}: is a folder; name one of its recipes, or use `trueup run {path}` for all of them"
        )
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe{nearest_path(path)}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None


def _yaml_message(path: Path, error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError):
        return f"{path}: not YAML: {str(error).splitlines()[0]}"
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark is not None else ""
    problem = str(error.problem or error.context or error)
    if "\\t" in problem:
        problem = "a tab begins the line; YAML indents with spaces"
    elif "mapping values are not allowed" in problem:
        problem = "a second ':' on the line; put the value in quotes"
    elif "duplicate key" in problem:
        problem = problem.split(" with ")[0]
    return f"{path}{line}: not valid YAML: {problem}"


# ---------------------------------------------------------------- the keys


def check_entries(
    entries: Iterable[Entry], schema: dict[str, Key], problems: list[str], notes: list[str]
) -> dict[str, Entry]:
    """The entries whose key and value fit the schema; what does not fit is added to `problems`."""
    entries = list(entries)
    raw = {entry.key: entry.value for entry in entries}
    seen: dict[str, Entry] = {}
    good: dict[str, Entry] = {}
    for entry in entries:
        if entry.key in seen:
            problems.append(f"{entry.place}: {entry.key} stands twice (first at {seen[entry.key].place})")
            continue
        seen[entry.key] = entry
        try:
            for key, value in _translate(entry, schema, raw, notes).items():
                good[key] = Entry(key, fit(value, schema[key]), entry.place)
        except BadValue as error:
            problems.append(f"{entry.place}: {entry.key} {error}{_yes_no(entry.value)}")
        except Refused as error:
            problems.append(f"{entry.place}: {entry.key} is retired: {error}")
        except KeyError as error:
            problems.append(f"{entry.place}: unknown key {entry.key}{_suggest(str(error.args[0]), schema)}")
    return good


def _translate(entry: Entry, schema: dict[str, Key], raw: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The entry as today's keys. Raises KeyError for a key the stage does not know."""
    if entry.key in schema:
        today = RETIRED_VALUES.get((entry.key, str(entry.value)))
        if today:
            notes.append(f"{entry.place}: {entry.key}: {entry.value} is retired: now called {today}")
        return {entry.key: today or entry.value}
    if entry.key not in RETIRED:
        raise KeyError(entry.key)
    retired = RETIRED[entry.key]
    new = retired.translate(entry.value, raw)
    for key in new:
        if key not in schema:
            raise Refused(f"{retired.why}, which this stage does not have")
        if key in raw:
            raise Refused(f"{retired.why}, and {key} is given too; delete one of them")
    notes.append(f"{entry.place}: {entry.key} is retired: {retired.why}")
    return new


def _suggest(key: str, schema: dict[str, Key]) -> str:
    names = [*schema, *COMMON_KEYS]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    if not close:
        close = difflib.get_close_matches(key.replace("-", "_").lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; `trueup VERB --help` lists every key of the stage"


def _yes_no(value: Any) -> str:
    return " (YAML 1.2 has only true and false)" if str(value).lower() in ("yes", "no", "on", "off") else ""


def _stage_of(entries: list[Entry], verb: str | None, source: Path | None) -> str:
    stated = [e for e in entries if e.key == "stage"]
    for entry in stated:
        if entry.value not in STAGES:
            close = difflib.get_close_matches(str(entry.value), STAGES, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; the stages are: {', '.join(STAGES)}"
            raise RecipeError([f"{entry.place}: there is no stage {show(entry.value)}{hint}"])
        if verb and entry.value != verb:
            raise RecipeError(
                [f"{entry.place}: this recipe is for `trueup {entry.value}`, not `trueup {verb}`"]
            )
    if verb:
        return verb
    if not stated:
        raise UsageError(f"{source}: names no stage; add `stage: ...`, one of {', '.join(STAGES)}")
    return str(stated[0].value)


def _budgets(entries: list[Entry], source: Path | None, problems: list[str]) -> dict[str, list[Entry]]:
    budgets: dict[str, list[Entry]] = {}
    for entry in (e for e in entries if e.key == "budgets"):
        if isinstance(entry.value, dict):
            budgets |= entry.value
        else:
            problems.append(
                f"{entry.place}: budgets takes named mappings, e.g. budgets: {{smoke: {{max_steps: 5}}}}"
            )
    for name in ("stage", "budgets"):
        places = [e.place for e in entries if e.key == name]
        if len(places) > 1:
            problems.append(f"{places[1]}: {name} stands twice (first at {places[0]})")
    return budgets


def _missing(schema: dict[str, Key], given: dict[str, Entry], source: Path | None, stage: str) -> list[str]:
    return [
        f"{source or stage}: {key.name} is missing: {key.help}"
        for key in schema.values()
        if key.required and (key.name not in given or given[key.name].value is None)
    ]


# ---------------------------------------------------------------- flags


def parse_flags(arguments: Sequence[str], schema: dict[str, Key]) -> list[Entry]:
    """`--key value`, `--key=value`, `--key` (true) and repeated values as entries; values are YAML.

    Raises:
        UsageError: a word that is neither a flag nor a flag's value.
    """
    entries: list[Entry] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(
                f"'{word}' is not a flag; flags are --key value, and the recipe goes after --config"
            )
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if equals else []
        while not equals and words and not _is_flag(words[0]):
            values.append(words.pop(0))
        entries.append(Entry(name, _flag_value(name, values, schema), f"--{name}"))
    return entries


def _is_flag(word: str) -> bool:
    return word.startswith("--")


def _flag_value(name: str, values: list[str], schema: dict[str, Key]) -> Any:
    """No value is `true`, several are a list, and a text key takes its value as it stands."""
    if not values:
        return True
    if len(values) > 1:
        return [_flag_value(name, [value], schema) for value in values]
    if name in schema and schema[name].hint in (str, str | None):
        return values[0]
    try:
        return YAML(typ="safe", pure=True).load(values[0])
    except YAMLError:
        return values[0]


# ---------------------------------------------------------------- printing


def render(recipe: Recipe) -> str:
    """The resolved recipe as YAML, each value with where it comes from: what --dry-run prints."""
    values = recipe.public()
    lines = [f"stage: {recipe.stage}"]
    ordered = sorted(recipe.values, key=lambda key: recipe.origin[key] == "default")
    for key in ordered:
        lines.append(f"{key}: {scalar(values[key])}  # {recipe.origin[key]}")
    return "\n".join(lines)


def scalar(value: Any) -> str:
    """A value in YAML's flow style; JSON is a subset of YAML 1.2, so it reads back the same."""
    return "null" if value is None else json.dumps(value, ensure_ascii=False, default=str)
