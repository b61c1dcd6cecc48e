"""The declared plans: two gloo ranks, each with half of the matrices, compute and learn what one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from trueup.base import GPTConfig, GPTForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "modern": {"num_key_value_heads": 2},
    "classic": {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True},
}
IDS = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(1))


def _rank(rank: int, folder: Path) -> None:
    import os

    import torch.distributed as distributed
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = GPTForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(tp_size=2), dtype=torch.float32
    )
    held = model.model.layers[0].attention.qkv_proj.weight
    out = model(IDS, labels=IDS)
    out.loss.backward()
    gradient = held.grad.full_tensor()
    if rank == 0:
        torch.save(
            {"logits": out.logits.detach(), "gradient": gradient, "rows": held.to_local().shape[0]},
            folder / "out.pt",
        )
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_two_ranks_compute_what_one_does(changes: Any, tmp_path: Path) -> None:
    shape = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = GPTForCausalLM(
        GPTConfig(**shape, max_position_embeddings=64, initializer_range=0.2, eos_token_id=None, **changes)
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)  # a bias that each rank added would show
    model.save_pretrained(tmp_path / "model")
    ranks = multiprocessing.start_processes(
        _rank, args=(tmp_path,), nprocs=2, join=False, start_method="fork"
    )
    while not ranks.join(timeout=60):
        pass
    found = torch.load(tmp_path / "out.pt")
    out = model.train()(IDS, labels=IDS)
    out.loss.backward()
    weight = model.model.layers[0].attention.qkv_proj.weight
    assert found["rows"] == weight.shape[0] // 2, "nothing was split"
    assert (found["logits"] - out.logits).abs().max() <= 1e-5
    assert (found["gradient"] - weight.grad).abs().max() <= 1e-5


def test_the_plans_name_modules_that_are_there() -> None:
    from fnmatch import fnmatch

    names = [name for changes in SHAPES.values() for name, _ in GPTForCausalLM(
        GPTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=9,
                  **{k: v for k, v in changes.items() if k != "num_key_value_heads"})
    ).model.named_modules()]  # fmt: skip
    for pattern in [*GPTConfig.base_model_tp_plan, *(GPTConfig.base_model_pp_plan or {})]:
        assert any(fnmatch(name, pattern) for name in names), pattern
    # A pipeline would add learned positions again at the start of every stage.
    assert GPTConfig(position="learned").base_model_pp_plan is None
