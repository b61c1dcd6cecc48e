"""What a card is about: a directory, its record and its lineage, as they may be shown to the world."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trueup.app.card_lineage import DATA, Node, draw, family
from trueup.app.card_public import public
from trueup.recipes.directory import ModelDirectory
from trueup.recipes.reader import scalar

Json = dict[str, Any]
Files = dict[str, Path | bytes]

LINEAGE = "card/lineage.png"


@dataclass(frozen=True)
class Subject:
    """A model or a data set.

    Args:
        model: its directory (of a data set also a file), with its record as it may be shown.
        nodes: its lineage, records as they may be shown; itself last.
        repo_id: where it will be on the Hub, if that is known.
        license: the Hub's identifier of one, if it was given.
    """

    model: ModelDirectory
    nodes: dict[str, Node]
    repo_id: str | None
    license: str | None

    @property
    def record(self) -> Json:
        """What was recorded of its making; empty where trueup did not make it."""
        return self.model.record

    @property
    def name(self) -> str:
        """The repository's, or the directory's."""
        if self.repo_id:
            return self.repo_id.rpartition("/")[2]
        path = self.model.path.absolute()
        return f"{path.parent.name}-adapter" if path.name == "adapter" else path.name

    @property
    def address(self) -> str:
        """What opens it: the repository, or the path as it was named."""
        path = self.model.path
        return self.repo_id or (path.name if path.is_absolute() else str(path))

    @property
    def stage(self) -> str:
        """Which stage made it."""
        return str(self.record.get("stage", "foreign"))

    @property
    def made(self) -> str:
        """The identity that its run wrote; of an adapter that of the merged model."""
        return str(self.record.get("identity", self.model.identity))

    def parents(self, role: str) -> list[Node]:
        """Those that served so."""
        node = self.nodes[self.model.identity]
        return [self.nodes[parent] for served, parent in node.parents if served == role]

    @property
    def data(self) -> list[Json]:
        """Fingerprints of what was read for it, a mixture's parts one by one, each with what is known of its
        licence."""
        parts = [part for one in self.record.get("data", []) for part in one.get("datasets", [one])]
        written = {node.name for node in self.parents(DATA)}
        return [part | {"license": _data_license(part, written)} for part in parts]


def hub_type(one: Json) -> str:
    """A data set as the model index names it: its Hub id, or a name that is nobody's id."""
    name = str(one["name"])
    return name if "revision" in one else name.replace("/", "-")


def _data_license(one: Json, written: set[str]) -> str:
    name = str(one["name"])
    if name.startswith("lab/"):
        return "written by trueup's own program: nobody's text"
    if Path(name).name in written:
        return "made in this lineage: that of what it was made from"
    return "see its page on the Hub" if "revision" in one else "not recorded"


def public_family(model: ModelDirectory) -> tuple[ModelDirectory, dict[str, Node]]:
    """A directory and its lineage, with records that may be shown."""
    folder = model.path.absolute().parent
    nodes = {
        key: replace(node, record=public(node.record, folder), name=str(public(node.name, folder)))
        for key, node in family(model).items()
    }
    return ModelDirectory(model.path, model.identity, public(model.record, folder)), nodes


def making(subject: Subject, files: Files) -> Json:
    """What the part on the making of it is rendered from; its picture goes to the files."""
    if len(subject.nodes) > 1:
        mine = replace(subject.nodes[subject.model.identity], name=subject.name)
        files[LINEAGE] = draw(subject.nodes | {subject.model.identity: mine})
    return {
        "it": subject,
        "record": subject.record,
        "files": files,
        "lineage": list(_rows(subject.nodes)),
        "total": _total(subject.nodes),
        "recipe": recipe_yaml(subject.record) if subject.record else "",
        "output_dir": subject.record.get("recipe", {}).get("output_dir", "DIR"),
        "started": str(subject.record.get("started", ""))[:10],
        "versions": subject.record.get("versions", {}),
        "seeds": subject.record.get("seeds", {}),
    }


def _rows(nodes: Mapping[str, Node]) -> Iterator[Json]:
    from trueup.eval.ladder_render import duration

    for node in nodes.values():
        record = node.record
        yield {
            "node": node,
            "made_of": [(role, nodes[parent].name) for role, parent in node.parents],
            "time": duration(record["seconds"]) if "seconds" in record else "not at hand",
            "tokens": f"{record['tokens']:,}" if "tokens" in record else "not at hand",
            "device": _device(record),
        }


def _device(record: Json) -> str:
    """What it ran on, as far as that is recorded."""
    if not record:
        return "not at hand"
    platform = record.get("versions", {}).get("platform", "")
    chip = "CPU" if record.get("recipe", {}).get("use_cpu") else "not recorded which device"
    return f"{chip}, {platform}" if platform else chip


def _total(nodes: Mapping[str, Node]) -> Json:
    from trueup.eval.ladder_render import duration

    known = [node.record for node in nodes.values() if "seconds" in node.record]
    return {
        "time": duration(sum(one["seconds"] for one in known)),
        "tokens": f"{sum(one['tokens'] for one in known):,}",
        "known": len(known),
        "all": len(nodes),
    }


def recipe_yaml(record: Json) -> str:
    """The recipe as it ran, without what is the default: a file that `trueup STAGE --config` takes."""
    recipe, origin = record.get("recipe", {}), record.get("origin", {})
    lines, by_machine = [f"stage: {record['stage']}"], []
    for key in [*origin, *(["seed"] if "seed" not in origin and "seed" in recipe else [])]:
        place = origin.get(key, "default")
        line = f"{key}: {scalar(recipe[key])}"
        if key.startswith("hub_") or key == "push_to_hub":
            continue
        if place.startswith(("this machine", "derived")):
            by_machine.append(f"# {line}  ({place})")
        else:
            lines.append(line)
    return "\n".join([*lines, *by_machine])
