"""The model card: README.md of what is pushed."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """README.md with its YAML head, and the pictures that go beside it by their path in the repository."""

    text: str
    files: dict[str, Path | bytes] = field(default_factory=dict)


def card(directory: Path, repo_id: str | None = None) -> Card:
    """The card of a model directory or a data set; a data set's own card if it has one."""
    own = directory / "README.md"
    if not (directory / "config.json").exists():
        return Card(own.read_text(encoding="utf-8") if own.exists() else f"# {repo_id or directory.name}\n")
    return Card(f"---\nlibrary_name: transformers\n---\n\n# {repo_id or directory.name}\n")
