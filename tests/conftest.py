"""What all tests share: quiet libraries, one thread, no network, and a toy stage for the ground floor."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a loaded box are slower than one
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from trueup.recipes.stages import STAGES


@dataclass
class ToyRecipe:
    """A stage without torch: it "trains" one tensor, so the ground floor can be tested in milliseconds."""

    output_dir: str = field(default="", metadata={"required": True, "help": "Where the model is written."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Where to start from."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Step size."})
    max_steps: int = field(default=10, metadata={"help": "Steps."})
    packing: bool = field(default=False, metadata={"help": "Pack rows."})
    optim: Literal["adamw", "muon"] = field(default="adamw", metadata={"help": "Optimizer."})
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"], metadata={"help": "Losses."})
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Their weights."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Warm-up."})
    dataset_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Options of the data set."})
    eval_steps: float | None = field(default=None, metadata={"help": "Evaluate every so many steps."})
    hub_token: str | None = field(default=None, metadata={"help": "Token."})
    logging_steps: int = 10
    seed: int = 0

    @classmethod
    def contradictions(cls, values: dict[str, Any]) -> list[tuple[str, str]]:
        weights = values.get("loss_weights")
        if weights and len(weights) != len(values.get("loss_type", ["sigmoid"])):
            return [("loss_weights", "needs one weight per loss_type")]
        return []

    def parents(self) -> dict[str, tuple[str, Any]]:
        return (
            {"model_name_or_path": (self.model_name_or_path, "causal-lm")} if self.model_name_or_path else {}
        )

    def data(self) -> list[dict[str, Any]]:
        return [{"name": "toy", "split": "train", "sha256": "0" * 64}]

    def run(self, run: Any) -> None:
        run.publish(
            lambda path: write_toy_model(path, self.learning_rate), {"loss": 1.5}, tokens=self.max_steps
        )


def write_toy_model(path: Path, value: float = 0.0, architecture: str = "ToyForCausalLM") -> Path:
    """The files of a model directory with one tensor, by hand."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(
        json.dumps({"architectures": [architecture], "transformers_version": "5"})
    )
    (path / "tokenizer.json").write_text('{"model": {}}')
    data = struct.pack("<2f", value, 1.0)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, len(data)]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.fixture
def toy_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers ToyRecipe as stage `toy` for one test."""
    monkeypatch.setitem(STAGES, "toy", ("conftest:ToyRecipe", "A toy."))


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe file; the text is taken as it stands."""

    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached in a folder of this test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def world(tmp_path: Path, own_cache: None) -> Any:
    """What arms of a comparison are made from; see compare_models.World."""
    from compare_models import World

    return World(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a base model of 2 layers, as pretraining would write it."""
    from sft_models import write_base

    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def recipe(tmp_path: Path, base: Path) -> Callable[..., Any]:
    """make(rows, name, **keys): an SFT recipe that starts from `base`."""
    from sft_models import recipe_maker

    return recipe_maker(tmp_path, base)
