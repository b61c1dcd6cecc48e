"""All that a model came from, each once: its records where they still lie on this disk, and a picture.

The picture is a PNG, which the Hub and any other viewer of Markdown show without a script of their own; a
table below it says the same in words.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.recipes.directory import RECORD, ModelDirectory, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

Json = dict[str, Any]

# How a parent served, by the recipe's key; and how its arrow is drawn.
START, DATA, REWARD = "begins as", "data", "reward"
_STYLES = {START: ("-", "#0072B2"), DATA: ("--", "#009E73"), REWARD: (":", "#D55E00")}
_OTHER = ("-.", "#777777")
_NAME = 22  # characters of a name that a box holds
_SNAPSHOT = re.compile(r"(?:^|/)models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots(?:/|$)")


@dataclass(frozen=True)
class Node:
    """One directory of the lineage.

    Args:
        parents: (how it served, identity).
        record: what it wrote of itself; empty if it is gone, changed, or foreign.
        hub_id: its repository on the Hub, where that is known.
    """

    identity: str
    name: str
    stage: str
    parents: tuple[tuple[str, str], ...]
    record: Json
    hub_id: str | None


def family(model: ModelDirectory) -> dict[str, Node]:
    """Every model and data set of a lineage by its identity, parents first, the model itself last."""
    found: dict[str, Node] = {}
    _add(found, model.lineage, model.record, model.path.absolute().parent)
    return found


def _add(found: dict[str, Node], lineage: Json, record: Json, folder: Path) -> None:
    for parent in lineage["parents"].values():
        if parent["identity"] not in found:
            _add(found, parent, _record(parent, folder), folder)
    parents = tuple((_served(role), parent["identity"]) for role, parent in lineage["parents"].items())
    name = Path(lineage["path"]).absolute().name
    hub_id = hub_id_of(lineage["path"], record)
    found[lineage["identity"]] = Node(
        lineage["identity"], hub_id or name, lineage["stage"], parents, record, hub_id
    )


def _record(lineage: Json, folder: Path) -> Json:
    """Where it was, or beside its descendant; of the same content, by its own record."""
    path = Path(lineage["path"])
    for place in (path, folder / path.name):
        if (place / RECORD).exists():
            record: Json = read_json(place / RECORD)
            if record.get("identity") == lineage["identity"]:
                return record
    return {}


def hub_id_of(path: str, record: Json) -> str | None:
    """The repository a directory is a snapshot of, or that its recipe published it to."""
    if snapshot := _SNAPSHOT.search(path):
        return f"{snapshot['owner']}/{snapshot['name']}"
    recipe = record.get("recipe", {})
    return recipe.get("hub_model_id") if recipe.get("push_to_hub") else None


def _served(role: str) -> str:
    key = role.partition("[")[0]
    if key == "model_name_or_path":
        return START
    if key in ("dataset_name", "datasets"):
        return DATA
    return REWARD if key in ("reward_model_name_or_path", "reward_funcs") else key.replace("_", " ")


def base_on_hub(nodes: Mapping[str, Node], identity: str) -> str | None:
    """The nearest model on the Hub that a model began as, itself or through others."""
    start = next((parent for role, parent in nodes[identity].parents if role == START), None)
    if start is None:
        return None
    return nodes[start].hub_id or base_on_hub(nodes, start)


# ------------------------------------------------------------------------------------------------ the picture


def draw(nodes: Mapping[str, Node]) -> bytes:
    """The lineage from left to right as a PNG: the same bytes for the same lineage."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    places = _places(nodes)
    columns = 1 + max(column for column, _ in places.values())
    rows = 1 + max(row for _, row in places.values())
    figure = Figure(figsize=(max(1.75 * columns, 4.0), 0.9 + 0.85 * rows), layout="constrained")
    axes = figure.subplots()
    last = list(nodes)[-1]
    boxes = {one: _box(axes, places[one], node, one == last) for one, node in nodes.items()}
    roles = dict.fromkeys(role for node in nodes.values() for role, _ in node.parents)
    for identity, node in nodes.items():
        for role, parent in node.parents:
            _arrow(axes, boxes[parent], boxes[identity], _STYLES.get(role, _OTHER))
    for role in roles:
        style, colour = _STYLES.get(role, _OTHER)
        axes.plot([], [], style, color=colour, label=role)
    if roles:
        figure.legend(loc="outside lower center", ncols=len(roles), frameon=False, fontsize=9)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.75))
    axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _places(nodes: Mapping[str, Node]) -> dict[str, tuple[int, int]]:
    """(column, row): one column right of the last of its parents."""
    columns: dict[str, int] = {}
    for identity, node in nodes.items():  # parents come first
        columns[identity] = 1 + max((columns[parent] for _, parent in node.parents), default=-1)
    members = list(columns.values())
    rows = {identity: members[:place].count(members[place]) for place, identity in enumerate(columns)}
    return {identity: (column, rows[identity]) for identity, column in columns.items()}


def _box(axes: "Axes", place: tuple[int, int], node: Node, last: bool) -> "Text":
    name = node.name if len(node.name) <= _NAME else node.name[: _NAME - 1] + "…"
    lines = [name, *([node.stage] if node.stage != name else []), node.identity[:12]]
    face, width = ("#e8f1fa", 1.8) if last else ("#ffffff", 1.0)
    return axes.text(
        *place, "\n".join(lines), ha="center", va="center", fontsize=9, parse_math=False, linespacing=1.35,
        bbox={"boxstyle": "round,pad=0.5", "facecolor": face, "edgecolor": "#444444", "linewidth": width},
    )  # fmt: skip


def _arrow(axes: "Axes", tail: "Text", head: "Text", style: tuple[str, str]) -> None:
    """From box to box: straight to the next column, in an arc over those between."""
    (start, _), (end, _) = tail.get_position(), head.get_position()
    axes.annotate(
        "", head.get_position(), tail.get_position(), zorder=4,
        arrowprops={
            "arrowstyle": "-|>", "linestyle": style[0], "color": style[1], "linewidth": 1.5,
            "patchA": tail.get_bbox_patch(), "patchB": head.get_bbox_patch(), "shrinkA": 1, "shrinkB": 1,
            "connectionstyle": f"arc3,rad={0 if end - start == 1 else -0.3}",
        },
    )  # fmt: skip
