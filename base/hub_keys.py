"""Publishing at a stage's end: the keys of every stage that writes a model or data.

What they ask for is done by `app/` when the stage is complete: no stage, and no trainer, talks to the Hub.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class HubArguments:
    """By the names of TrainingArguments."""

    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Push the finished result to the Hub, verified and with a card, as `trueup push`."},
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "The repository: user/name, or a name of your own; default: that of output_dir."},
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Make it private; default: as your account has it."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "The branch; default: main."})
    # Transformers' every_save uploads checkpoints while training, which nothing has verified.
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When: at the end, once; every_save, as many recipes have it, means the same here."
        },
    )


def hub_contradictions(given: dict[str, Any]) -> list[tuple[str, str]]:
    """See `trueup.recipes.stages.Stage`."""
    found = []
    if given.get("hub_token"):
        found.append(
            (
                "hub_token",
                "does not belong in a recipe: log in with `hf auth login`, or set HF_TOKEN; delete it",
            )
        )
    if not given.get("push_to_hub"):
        return found
    if given.get("hub_strategy", "end") not in ("end", "every_save"):
        found.append(("hub_strategy", "must be end: a stage is pushed once, when it is complete; delete it"))
    if given.get("hub_always_push"):
        found.append(("hub_always_push", "is about pushes while training, and there are none; delete it"))
    return found
