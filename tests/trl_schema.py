"""A stage schema made of TRL's own classes, as the stages on TRL have it."""

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig, SFTConfig


@dataclass
class TrlRecipe(ModelConfig, SFTConfig):
    datasets: list[dict[str, Any]] | None = field(default=None, metadata={"help": "A mixture."})

    @classmethod
    def contradictions(cls, values: dict[str, Any]) -> list[tuple[str, str]]:
        return []
