"""The declared plans: two gloo ranks, each with half of the model, compute and learn what one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from transformers.distributed import DistributedConfig

from trueup.base import GPTConfig, GPTForCausalLM
from trueup.base.modeling_gpt import GPTBlock

SHAPES: dict[str, dict[str, Any]] = {
    "modern": {"num_key_value_heads": 2},
    "classic": {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True},
}
IDS = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(1))


def _rank(rank: int, folder: Path, sizes: dict[str, int]) -> None:
    import os

    import torch.distributed as distributed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = GPTForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(**sizes), dtype=torch.float32
    )
    if "pp_size" in sizes:
        found = {"layers": sum(isinstance(layer, GPTBlock) for layer in model.model.layers)}
        found["logits"] = model.eval()(IDS).logits.detach()
    else:
        held = model.model.layers[0].attention.qkv_proj.weight
        out = model.train()(IDS, labels=IDS)
        out.loss.backward()
        found = {"logits": out.logits.detach(), "rows": held.to_local().shape[0]}
        found["gradient"] = held.grad.full_tensor()
    if rank == 0:
        torch.save(found, folder / "out.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def saved(folder: Path, changes: dict[str, Any]) -> GPTForCausalLM:
    shape = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = GPTForCausalLM(
        GPTConfig(**shape, max_position_embeddings=64, initializer_range=0.2, eos_token_id=None, **changes)
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)  # a bias that each rank added would show
    model.save_pretrained(folder / "model")
    return model


def on_two_ranks(folder: Path, **sizes: int) -> dict[str, Any]:
    """What `_rank` found on the first of two."""
    ranks = multiprocessing.start_processes(
        _rank, args=(folder, sizes), nprocs=2, join=False, start_method="fork"
    )
    while not ranks.join(timeout=60):
        pass
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("split", ["tp_size", "fsdp_size"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_two_ranks_compute_what_one_does(changes: Any, split: str, tmp_path: Path) -> None:
    model = saved(tmp_path, changes)
    found = on_two_ranks(tmp_path, **{split: 2})
    out = model.train()(IDS, labels=IDS)
    out.loss.backward()
    weight = model.model.layers[0].attention.qkv_proj.weight
    assert found["rows"] == weight.shape[0] // 2, "nothing was split"
    assert (found["logits"] - out.logits).abs().max() <= 1e-5
    assert (found["gradient"] - weight.grad).abs().max() <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_pipeline_of_two_computes_what_one_rank_does(tied: bool, tmp_path: Path) -> None:
    model = saved(tmp_path, {"tie_word_embeddings": tied})
    found = on_two_ranks(tmp_path, pp_size=2)
    assert found["layers"] == 1, "nothing was split"
    assert (found["logits"] - model.eval()(IDS).logits).abs().max() <= 1e-5


def test_learned_positions_have_no_pipeline(tmp_path: Path) -> None:
    """Each stage would add them once more, and Transformers would not notice."""
    classic = saved(tmp_path, SHAPES["classic"])
    assert not classic.supports_pp_plan
    assert saved(tmp_path / "modern", SHAPES["modern"]).supports_pp_plan
    with pytest.raises(ValueError, match="learned positions has no pipeline"):
        GPTForCausalLM.maybe_distribute_model(classic, DistributedConfig(pp_size=2), None)
