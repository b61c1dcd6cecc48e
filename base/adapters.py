"""LoRA: TRL's ModelConfig keys as a PEFT config, checked before training; merging, checked after it.

A stage that trains an adapter writes the merged model: the next one never meets an adapter on an adapter.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trueup.recipes.directory import ModelDirectory
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.hub import local_directory

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel

# Largest |merged - adapted| logit, as a share of the largest logit (at least of 1): rounding, nothing more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}

_NEEDS_PEFT = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters",
    "lora_modules_to_save", "use_rslora", "use_dora", "load_in_4bit", "load_in_8bit",
)  # fmt: skip
_NEEDS_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


def contradictions(given: dict[str, Any]) -> list[tuple[str, str]]:
    """Keys of ModelConfig that are each right and wrong together, as `(key, message)`."""
    found = []
    if not given.get("use_peft"):
        found += [
            (key, "is for LoRA: add use_peft: true, or delete it") for key in _NEEDS_PEFT if given.get(key)
        ]
    if not given.get("load_in_4bit"):
        found += [
            (key, "is read with load_in_4bit: true alone; delete it") for key in _NEEDS_4BIT if key in given
        ]
    if given.get("load_in_4bit") and given.get("load_in_8bit"):
        found.append(("load_in_8bit", "and load_in_4bit exclude each other; delete one"))
    return found


def quantization(recipe: Any) -> "BitsAndBytesConfig | None":
    """How to load the base model's weights, from `load_in_4bit` / `load_in_8bit` and `bnb_4bit_*`.

    Raises:
        UsageError: bitsandbytes is not installed, or there is no device it works on.
    """
    from trl import get_quantization_config

    wanted = next((key for key in ("load_in_4bit", "load_in_8bit") if getattr(recipe, key)), None)
    if wanted is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{wanted}: needs bitsandbytes: pip install bitsandbytes, or delete the key")
    if recipe.use_cpu:
        raise UsageError(f"{wanted}: needs a GPU, and this run is on the CPU; delete the key")
    return get_quantization_config(recipe)


def lora_config(recipe: Any, model: "PreTrainedModel", task_type: str = "CAUSAL_LM") -> "LoraConfig | None":
    """The adapter that a recipe's `use_peft` and `lora_*` ask for; None for full fine-tuning.

    Args:
        task_type: CAUSAL_LM, or SEQ_CLS for a reward model.

    Raises:
        UsageError: it would touch the output layer, or the embedding it is tied to, or nothing at all.
    """
    from trl import get_peft_config

    recipe.lora_task_type = task_type
    config = get_peft_config(recipe)
    if config is None:
        return None
    # Trained whole, embedding and head of a tied model must remain one matrix.
    config.ensure_weight_tying = _is_tied(model) and bool(config.modules_to_save)
    _check_targets(config, model)
    return config


def _is_tied(model: "PreTrainedModel") -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


def _check_targets(config: "LoraConfig", model: "PreTrainedModel") -> None:
    """Refuse what is silently wrong: TRL computes the loss from the head's own weight, so an adapter on it is
    never trained; and merged into a matrix that is embedding and head at once, an adapter on either changes
    both."""
    if config.target_modules == "all-linear":  # leaves the output layer out by itself
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    hit = [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
    if not hit and not config.target_parameters:
        linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        raise UsageError(
            f"lora_target_modules: {_shown(config.target_modules)} names no module of the model; it has "
            f"{', '.join(sorted(linear))}, and all-linear means all of them but the output layer"
        )
    modules = dict(model.named_modules())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name in hit:
        if head is not None and modules[name] is head:
            tied = " and is tied to the embedding" if _is_tied(model) else ""
            raise UsageError(
                f"lora_target_modules: {name} is the output layer{tied}: an adapter on it would not train, "
                f"or merge wrongly. Take it out; to train it whole, lora_modules_to_save: [{name}]"
            )
        if modules[name] is embedding and _is_tied(model):
            raise UsageError(
                f"lora_target_modules: {name} is tied to the output layer: an adapter on it would merge "
                f"wrongly. Take it out; to train it whole, lora_modules_to_save: [{name.split('.')[-1]}]"
            )


def _shown(targets: Any) -> str:
    return targets if isinstance(targets, str) else ", ".join(sorted(targets))


def is_adapter(model: Any) -> bool:
    """Whether a model carries a PEFT adapter."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def assert_reference(policy: Any, start: ModelDirectory) -> None:
    """Under LoRA the reference is the policy without its adapter: that is the start model, bit by bit.

    `start` was opened by its content hash; here each of its tensors is compared with the one in memory.

    Raises:
        TrueupError: they differ.
    """
    if not is_adapter(policy) or getattr(policy.get_base_model(), "is_quantized", False):
        return
    held = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in policy.get_base_model().state_dict().items()
        if "lora_" not in name and ".modules_to_save." not in name
    }
    for name, tensor in _stored(start.path):
        if name not in held or not torch.equal(held[name].cpu(), tensor.to(held[name].dtype)):
            raise TrueupError(
                f"{start.path}: {name} of the reference is not that of the model it started from "
                f"({start.identity[:12]}); an adapter was merged into it, or its weights were changed"
            )


def _stored(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                yield name, file.get_tensor(name)


def merge(adapted: Any, probe: dict[str, torch.Tensor]) -> "PreTrainedModel":
    """Merge an adapter into its model, in place, and check that nothing but rounding changed.

    Args:
        adapted: a PeftModel; on a quantised base, its weights are dequantised by the merge.
        probe: a small batch for the check.

    Raises:
        TrueupError: the merged model is another one.
    """
    before = _logits(adapted, probe)
    merged = adapted.merge_and_unload(safe_merge=True)
    quantised = getattr(merged, "is_quantized", False)
    if quantised:
        merged = merged.dequantize()
    difference = float((_logits(merged, probe) - before).abs().max())
    allowed = TOLERANCE[merged.dtype] * max(1.0, float(before.abs().max()))
    if difference > allowed and not quantised:  # rounding to 4 bits is lost and cannot be checked so
        raise TrueupError(
            f"merging the adapter changed the model: logits differ by {difference:.2g} (allowed "
            f"{allowed:.2g}); check lora_target_modules and lora_modules_to_save. Where a stage trained it, "
            "its last checkpoint holds the adapter"
        )
    return merged


@torch.no_grad()
def _logits(model: Any, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, T, V) or scores (B, labels), in fp32, without dropout."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = model(**{name: tensor.to(device) for name, tensor in probe.items()}).logits.float()
    model.train(training)
    return logits


def merge_directory(
    adapter: Path | str, base: str | None, trust_remote_code: bool = False
) -> tuple[Any, Any, str]:
    """A merged model from an adapter's directory, as PEFT, TRL and others write them.

    Args:
        adapter: its directory, or a Hub id.
        base: the model the adapter was trained on, a directory or Hub id; default: the one it names.

    Returns:
        The model, its tokenizer (the adapter's own if it brings one), and the base's name.

    Raises:
        UsageError: it is not an adapter, names no base, or does not fit the base.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    adapter = Path(local_directory(adapter))
    if not (adapter / "adapter_config.json").exists():
        raise UsageError(f"{adapter}: not an adapter: adapter_config.json is missing")
    config = PeftConfig.from_pretrained(str(adapter))
    name = base or config.base_model_name_or_path
    if not name:
        raise UsageError(f"{adapter}: does not say which model it belongs to; name it with --base")
    classifier = config.task_type == "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    options = {"num_labels": 1} if classifier else {}
    try:
        found = local_directory(name)
        model = auto_class.from_pretrained(
            found, trust_remote_code=trust_remote_code, dtype="auto", **options
        )
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{adapter}: does not open on {name}: {reason}; name its base with --base"
        ) from error
    own = (adapter / "tokenizer_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(
        str(adapter) if own else found, trust_remote_code=trust_remote_code
    )
    probe = {"input_ids": torch.arange(min(16, len(tokenizer)))[None]}
    return merge(adapted, probe), tokenizer, name
