"""What keys a stage knows, read off its dataclass, and whether a value fits the type of its key.

A stage's schema is a dataclass (mostly one of TRL's configs plus a few fields): the field names are the keys,
the annotations their types, `metadata["help"]` their meaning. Nothing is written down a second time.
"""

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union


class BadValue(ValueError):
    """The value does not fit the key; the message says what would."""


@dataclass(frozen=True)
class Key:
    """One key of a stage: its type, default and meaning."""

    name: str
    hint: Any
    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    required: bool = False
    group: str = ""  # the dataclass it comes from: headings of --help


def schema_of(stage_class: type) -> dict[str, Key]:
    """Every key of a stage's dataclass, the stage's own and closest ones first."""
    hints = typing.get_type_hints(stage_class)
    keys = {}
    for field in dataclasses.fields(stage_class):
        if not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        keys[field.name] = Key(
            name=field.name,
            hint=hints[field.name],
            default=default,
            help=" ".join(str(field.metadata.get("help") or "").split()),
            choices=tuple(field.metadata.get("choices") or ()),
            required=default is dataclasses.MISSING or bool(field.metadata.get("required")),
            group=_home(stage_class, field.name),
        )
    order = [cls.__name__ for cls in stage_class.__mro__]
    return dict(sorted(keys.items(), key=lambda item: order.index(item[1].group)))


def _home(stage_class: type, name: str) -> str:
    """The most basic class that declares the field: an overridden default stays with its family."""
    owners = [cls for cls in stage_class.__mro__ if name in inspect.get_annotations(cls)]
    return owners[-1].__name__


def fit(value: Any, key: Key) -> Any:
    """The value as the key's type, converted only where nothing can be meant otherwise.

    A whole number is a float; 8e3 is the integer 8000; a lone value is a list of one (as on TRL's command
    line). Text is never read as a number or a truth value, nor the other way round.

    Raises:
        BadValue: saying what the key takes.
    """
    if value is None and key.default is None:
        return None
    value = _fit(value, key.hint)
    if key.choices and value not in key.choices:
        raise BadValue(f"takes one of {', '.join(map(str, key.choices))}, not {show(value)}")
    return value


def _fit(value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
        raise BadValue(f"takes one of {', '.join(map(str, typing.get_args(hint)))}, not {show(value)}")
    if origin in (Union, types.UnionType):
        return _fit_union(value, typing.get_args(hint))
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        return _fit_list(value, hint)
    if origin in (dict, Mapping) or hint is dict or dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise BadValue(f"takes a mapping (key: value), not {show(value)}")
        return dict(value)
    return _fit_scalar(value, hint)


def _fit_union(value: Any, options: tuple[Any, ...]) -> Any:
    if value is None:
        if type(None) in options:
            return None
        raise BadValue(f"takes {_names(options)}, and was left empty")
    enums = [o for o in options if isinstance(o, type) and issubclass(o, enum.Enum)]
    if enums and isinstance(value, str):  # `SchedulerType | str` means: a name from the enumeration
        return _fit_scalar(value, enums[0])
    # Exact matches first: 3 stays an integer under `float | int`, a list a list under `str | list`.
    for option in options:
        if isinstance(option, type) and type(value) is option:
            return value
    for option in options:
        try:
            return _fit(value, option)
        except BadValue:
            continue
    raise BadValue(f"takes {_names(options)}, not {show(value)}")


def _fit_list(value: Any, hint: Any) -> list[Any]:
    if isinstance(value, Mapping) or value is None:
        raise BadValue(f"takes a list, not {show(value)}")
    items = list(value) if isinstance(value, list | tuple) else [value]
    inner = [a for a in typing.get_args(hint) if a is not Ellipsis]
    return [_fit(item, inner[0]) for item in items] if inner else items


def _fit_scalar(value: Any, hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        names = [str(member.value) for member in hint]
        if isinstance(value, hint):
            return value.value
        if str(value) not in names:
            raise BadValue(f"takes one of {', '.join(names)}, not {show(value)}")
        return str(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if hint is int and number and float(value).is_integer():
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint is type(None) and value is None:
        return None
    if hint is str and (number or isinstance(value, bool)):
        raise BadValue(f"takes text, not {show(value)}: put it in quotes if it is a name")
    if hint in (bool, int, float, str):
        raise BadValue(f"takes {_names((hint,))}, not {show(value)}")
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise BadValue(f"takes {_names((hint,))}, not {show(value)}")


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def _names(options: tuple[Any, ...]) -> str:
    words = []
    for option in options:
        if option is type(None):
            continue
        base = typing.get_origin(option) or option
        if base is Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(option))))
        else:
            words.append(_WORDS.get(base, getattr(base, "__name__", str(base))))
    return " or ".join(dict.fromkeys(words)) or "nothing"


def show(value: Any) -> str:
    """A value as it would stand in a message: short, and telling text from number."""
    kind = {
        bool: "",
        int: "the number ",
        float: "the number ",
        str: "the text ",
        list: "the list ",
        dict: "the mapping ",
    }
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return kind.get(type(value), "") + (text if len(text) <= 60 else text[:57] + "...")


def type_name(key: Key) -> str:
    """The key's type in plain words, for --help."""
    options = (
        typing.get_args(key.hint) if typing.get_origin(key.hint) in (Union, types.UnionType) else (key.hint,)
    )
    enums = [o for o in options if isinstance(o, type) and issubclass(o, enum.Enum)]
    if key.choices or enums:
        return "one of " + ", ".join(str(c) for c in key.choices or [m.value for m in enums[0]])
    return _names(options)
