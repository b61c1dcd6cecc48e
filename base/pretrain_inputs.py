"""What pretraining starts from: tokenizer, packed text, and the numbers that follow, printed with reasons."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trueup.base.batches import Shares
from trueup.base.data import DataReport, load_data
from trueup.base.modeling_gpt import GPTForCausalLM
from trueup.base.optimizers import parameter_groups
from trueup.base.packing import Packed, cached_documents, check_special_tokens, pack, tokenize
from trueup.base.pretrain import PretrainRecipe
from trueup.base.schedule import steps_of
from trueup.base.tokenizer import train_tokenizer
from trueup.recipes.directory import atomic_directory
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.run import Run

TOKENIZER_CHARACTERS = 200_000_000  # more text changes few merges, and this much takes half a minute
OPENING_WORDS = 6


@dataclass
class Inputs:
    """Tokenizer and text. `packed` is None for a stream, whose `texts` are read while training."""

    tokenizer: PreTrainedTokenizerFast
    packed: Packed | None
    texts: Any
    held_out: Packed
    openings: list[str]
    floor: float | None  # entropy of the held-out text in bits per byte, where it is known


def read_inputs(
    recipe: PretrainRecipe, run: Run, accelerator: Accelerator, say: Callable[[str], None]
) -> Inputs:
    """Load, tokenise and pack. The main process fills the caches, the others read them."""
    from datasets import config as datasets_config

    reports: list[DataReport] = []
    with accelerator.main_process_first():
        texts = load_data(recipe, "train", "text", reports)
        held_out_texts = load_data(recipe, "validation", "text", reports)
        tokenizer = open_tokenizer(recipe, texts, run.work_dir)
        packed = None
        if not recipe.dataset_streaming:
            cache = Path(datasets_config.HF_DATASETS_CACHE) / "trueup-tokens"
            documents = cached_documents((row["text"] for row in texts), tokenizer, run.data[0], cache)
            packed = pack(documents, recipe.max_length, tokenizer.pad_token_id)
    for report in (
        reports if not recipe.dataset_streaming else []
    ):  # of a stream nothing is known before it is read
        for line in report.lines():
            say(line)
    held_out = pack(
        tokenize((row["text"] for row in held_out_texts), tokenizer, recipe.max_eval_tokens),
        recipe.max_length,
        tokenizer.pad_token_id,
    )
    if not len(held_out) or (packed is not None and not len(packed)):
        raise TrueupError("dataset_name: there is no text to train on, or none to measure on")
    texts_scored = (row["text"] for row in held_out_texts if row["text"])
    scored = list(islice(texts_scored, len(held_out.documents.ends)))
    openings = [" ".join(text.split()[:OPENING_WORDS]) for text in scored[:3]]
    return Inputs(tokenizer, packed, texts, held_out, openings, _entropy_floor(recipe, scored))


def open_tokenizer(
    recipe: PretrainRecipe, texts: Iterable[dict[str, Any]], work_dir: Path
) -> PreTrainedTokenizerFast:
    """The tokenizer the recipe names, or one trained on its documents; a resumed run finds it again."""
    path = recipe.tokenizer_name_or_path or str(work_dir / "tokenizer")
    if not recipe.tokenizer_name_or_path and not Path(path).exists():
        trained = train_tokenizer(
            _first_characters((row["text"] for row in texts), TOKENIZER_CHARACTERS),
            recipe.vocab_size,
            model_max_length=recipe.max_position_embeddings or recipe.max_length,
        )
        with atomic_directory(Path(path)) as staging:
            trained.save_pretrained(staging)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer_name_or_path: {path}: {str(error).splitlines()[0]}") from error
    check_special_tokens(tokenizer, f"tokenizer_name_or_path: {path}")
    return tokenizer


def _first_characters(texts: Iterable[str], characters: int) -> Iterable[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters < 0:
            return


def _entropy_floor(recipe: PretrainRecipe, texts: list[str]) -> float | None:
    if recipe.dataset_name != "lab/text":
        return None
    from trueup.recipes.lab.text import floors

    return floors(texts, (recipe.dataset_options or {}).get("world_seed", 0))["all"].bits_per_byte


# ---------------------------------------------------------------- derived numbers


@dataclass(frozen=True)
class Plan:
    """Everything that follows from the recipe, the data and the number of processes."""

    shares: Shares
    steps: int
    warmup: int
    eval_every: int
    save_every: int
    log_every: int

    @classmethod
    def of(cls, recipe: PretrainRecipe, rows: int | None, processes: int, rank: int) -> "Plan":
        """`rows` are those of one epoch; None for a stream."""
        shares = Shares(
            recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps, rank, processes
        )
        steps = recipe.max_steps
        if steps < 1 and rows is not None:
            steps = math.ceil(recipe.num_train_epochs * rows / shares.rows_per_step)
        every = [
            max(1, steps_of(v, steps)) for v in (recipe.eval_steps, recipe.save_steps, recipe.logging_steps)
        ]
        return cls(shares, steps, steps_of(recipe.warmup_steps, steps), *every)

    def lines(self, recipe: PretrainRecipe, inputs: Inputs, model: GPTForCausalLM) -> Iterable[str]:
        """The numbers and where they come from."""
        shares, length = self.shares, recipe.max_length
        groups = {name: sum(p.numel() for p in group) for name, group in parameter_groups(model).items()}
        parameters, tokens = sum(groups.values()), self.steps * shares.rows_per_step * length
        yield f"parameters       {parameters:,}, of them {groups['hidden']:,} in matrices of the blocks"
        yield f"vocabulary       {len(inputs.tokenizer):,}"
        if inputs.packed is not None:
            yield f"training text    {_packing(inputs.packed)}"
        yield f"held-out text    {_packing(inputs.held_out)}"
        yield (
            f"tokens per step  {shares.rows_per_step * length:,} = {shares.size} rows x {length} tokens"
            f" x {shares.micro} accumulated x {shares.world} process(es)"
        )
        epochs = "" if inputs.packed is None else f"{tokens / (len(inputs.packed) * length):.2f} epochs, "
        yield (
            f"steps            {self.steps:,} = {tokens:,} tokens: {epochs}"
            f"{tokens / parameters:.1f} per parameter"
        )
        yield (
            f"learning rate    {recipe.learning_rate:g}: {self.warmup:,} steps of warm-up (warmup_steps "
            f"{recipe.warmup_steps:g}), then {recipe.lr_scheduler_type}"
        )


def _packing(packed: Packed) -> str:
    documents = packed.documents
    return (
        f"{documents.text_bytes:,} bytes, {len(documents.ends):,} documents, "
        f"{len(documents.tokens):,} tokens in {len(packed):,} rows: none lost, "
        f"{packed.padding:.2%} of the positions padded"
    )
