"""Defaults that depend on the machine: TRL's own raise on a laptop (bf16 on, a GPU expected)."""

import importlib.util
from typing import Any

from trueup.recipes.schema import Key


def machine_defaults(schema: dict[str, Key], given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Key -> (value, why) for the device keys of a stage that nobody set.

    A key somebody set is never touched, and the others are chosen to agree with it.
    """
    wanted = [
        key
        for key in ("use_cpu", "bf16", "fp16", "attn_implementation", "dataloader_pin_memory")
        if key in schema
    ]
    if all(key in given for key in wanted):
        return {}
    device = "cpu" if given.get("use_cpu") else accelerator()
    chosen: dict[str, tuple[Any, str]] = {
        "use_cpu": (device == "cpu", "no GPU found" if device == "cpu" else f"{device} found"),
        "dataloader_pin_memory": (device == "cuda", f"device {device}"),
    }
    chosen |= _precision(device, given)
    if device == "cuda" and importlib.util.find_spec("flash_attn"):
        chosen["attn_implementation"] = ("flash_attention_2", "flash-attn is installed")
    return {key: chosen[key] for key in wanted if key in chosen and key not in given}


def _precision(device: str, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """bf16 wherever it is fast; fp16 only on GPUs without it; a choice of the user rules out the other."""
    if given.get("fp16"):
        return {"bf16": (False, "fp16 was chosen")}
    if given.get("bf16"):
        return {"fp16": (False, "bf16 was chosen")}
    if "bf16" not in given and has_bf16(device):
        return {"bf16": (True, f"{device} has bf16"), "fp16": (False, "bf16 is used")}
    fp16 = device == "cuda" and "bf16" not in given
    return {
        "bf16": (False, f"{device} has no fast bf16"),
        "fp16": (fp16, "a GPU without bf16" if fp16 else f"device {device}"),
    }


def accelerator() -> str:
    """`cuda`, `mps`, `xpu`, ... or `cpu`."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None else "cpu"


def has_bf16(device: str) -> bool:
    """Whether bf16 is fast there: a CPU without AVX512-BF16 or AMX emulates it, slower than fp32."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
