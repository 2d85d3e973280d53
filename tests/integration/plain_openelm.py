"""OpenELM's forward pass, written out on plain tensors: what our model code is checked against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu


class PlainOpenELM:
    """One prompt at a time, nothing cached, every number in float32."""

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.tensors, self.fields = load_file(folder / "model.safetensors"), fields

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """``[vocabulary]`` after the last token."""
        weights, head = self.tensors, self.fields["head_dim"]
        x = weights["transformer.token_embeddings.weight"][tokens]
        angles = torch.arange(len(tokens))[:, None] / 10000 ** (torch.arange(0, head, 2) / head)
        for i, (heads, kv_heads) in enumerate(
            zip(self.fields["num_query_heads"], self.fields["num_kv_heads"], strict=True)
        ):
            layer = f"transformer.layers.{i}"
            rows = self.norm(x, f"{layer}.attn_norm") @ weights[f"{layer}.attn.qkv_proj.weight"].T
            rows = rows.view(len(tokens), heads + 2 * kv_heads, head).transpose(0, 1)
            query, key, value = rows[:heads], rows[heads : heads + kv_heads], rows[heads + kv_heads :]
            query = self.turn(self.norm(query, f"{layer}.attn.q_norm"), angles)
            key = self.turn(self.norm(key, f"{layer}.attn.k_norm"), angles)
            key, value = (t.repeat_interleave(heads // kv_heads, 0) for t in (key, value))
            scores = query @ key.transpose(1, 2) / head**0.5
            future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
            seen = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
            x = x + seen.transpose(0, 1).flatten(1) @ weights[f"{layer}.attn.out_proj.weight"].T
            inner = self.norm(x, f"{layer}.ffn_norm") @ weights[f"{layer}.ffn.proj_1.weight"].T
            gate, rest = inner.chunk(2, dim=-1)
            x = x + (silu(gate) * rest) @ weights[f"{layer}.ffn.proj_2.weight"].T
        x = self.norm(x[-1], "transformer.norm")
        return x @ weights["transformer.token_embeddings.weight"].T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.tensors[f"{name}.weight"]

    @staticmethod
    def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        cos, sin = angles.cos(), angles.sin()
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """New tokens, the end token left out."""
        tokens = list(prompt)
        for _ in range(max_tokens):
            best = int(self.logits(tokens).argmax())
            if best == self.fields["eos_token_id"]:
                break
            tokens.append(best)
        return tokens[len(prompt) :]
