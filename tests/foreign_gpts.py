"""GPTs as others publish them, written from the shapes and names of their state dicts: to import from."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Causal attention of (B, T, C) in so many heads."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Norm(nn.Module):
    """LayerNorm with a choice of names."""

    def __init__(self, width: int, bias: bool, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        self.register_parameter(names[0], nn.Parameter(torch.ones(width)))
        self.register_parameter(names[1], nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (getattr(self, name) for name in self.names)
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


class NanoGPT(nn.Module):
    """https://github.com/karpathy/nanoGPT: one matrix for q, k, v; exact GELU; tied; biases or none."""

    def __init__(self, vocab: int, context: int, width: int, layers: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        names = ("weight", "bias")

        def block() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    "ln_1": Norm(width, bias, names),
                    "attn": nn.ModuleDict(
                        {
                            "c_attn": nn.Linear(width, 3 * width, bias=bias),
                            "c_proj": nn.Linear(width, width, bias=bias),
                        }
                    ),
                    "ln_2": Norm(width, bias, names),
                    "mlp": nn.ModuleDict(
                        {
                            "c_fc": nn.Linear(width, 4 * width, bias=bias),
                            "c_proj": nn.Linear(4 * width, width, bias=bias),
                        }
                    ),
                }
            )

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(block() for _ in range(layers)),
                "ln_f": Norm(width, bias, names),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for layer in self.transformer.h:  # the mask, where there is no flash attention
            mask = torch.ones(context, context).tril().view(1, 1, context, context)
            layer.attn.register_buffer("bias", mask)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        parts: Any = self.transformer
        x = parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1]))
        for layer in parts.h:
            q, k, v = layer.attn.c_attn(layer.ln_1(x)).chunk(3, dim=-1)
            x = x + layer.attn.c_proj(attend(q, k, v, self.heads))
            x = x + layer.mlp.c_proj(F.gelu(layer.mlp.c_fc(layer.ln_2(x))))
        return self.lm_head(parts.ln_f(x))


class GPTModel(nn.Module):
    """https://github.com/rasbt/LLMs-from-scratch: q, k, v apart, GELU by tanh, untied."""

    def __init__(self, vocab: int, context: int, width: int, layers: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        names = ("scale", "shift")

        def block() -> nn.ModuleDict:
            att = {f"W_{part}": nn.Linear(width, width, bias=qkv_bias) for part in ("query", "key", "value")}
            layers = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
            )
            parts = {
                "att": nn.ModuleDict(att | {"out_proj": nn.Linear(width, width)}),
                "ff": nn.ModuleDict({"layers": layers}),
                "norm1": Norm(width, True, names),
                "norm2": Norm(width, True, names),
            }
            parts["att"].register_buffer("mask", torch.ones(context, context).triu(1))
            return nn.ModuleDict(parts)

        self.tok_emb = nn.Embedding(vocab, width)
        self.pos_emb = nn.Embedding(context, width)
        self.trf_blocks = nn.Sequential(*(block() for _ in range(layers)))
        self.final_norm = Norm(width, True, names)
        self.out_head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        blocks: Any = self.trf_blocks
        for block in blocks:
            normed, att = block.norm1(x), block.att
            parts = (att.W_query(normed), att.W_key(normed), att.W_value(normed))
            x = x + att.out_proj(attend(*parts, self.heads))
            x = x + block.ff.layers(block.norm2(x))
        return self.out_head(self.final_norm(x))


def randomised(model: nn.Module) -> Any:
    """Every parameter at random, so that a swapped or forgotten one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if weight.ndim == 1 else 0.12 * noise)
    return model.eval()
