"""Phi-3-small's forward pass, written out on plain tensors: what our model code is checked against."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class PlainPhi3Small:
    """One prompt at a time, nothing cached, every number in float32.

    With LongRoPE a token has the factors of the length that its sequence had when it was computed: a prompt is
    computed as a whole, each later token when it is the last one.
    """

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.tensors, self.fields = load_file(folder / "model.safetensors"), fields
        self.heads, self.kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        self.head_dim = fields["hidden_size"] // self.heads

    def logits(self, tokens: list[int], num_prompt: int | None = None) -> torch.Tensor:
        """``[vocabulary]`` after the last token."""
        fields, weights = self.fields, self.tensors
        cos, sin = self.rotations(len(tokens), len(tokens) if num_prompt is None else num_prompt)
        x = weights["model.embed_tokens.weight"][tokens] * fields["mup_embedding_multiplier"]
        for i in range(fields["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            every = fields["dense_attention_every_n_layers"]
            dense = every is not None and (i + 1) % every == 0
            x = x + self.attention(self.norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn", cos, sin, dense)
            inner = self.linear(self.norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.up_proj")
            limit = fields["gegelu_limit"]
            gate, rest = inner[:, 0::2].clamp(max=limit), inner[:, 1::2].clamp(-limit, limit)
            x = x + self.linear(gate / (1 + (-1.702 * gate).exp()) * (rest + 1), f"{layer}.mlp.down_proj")
        x = self.norm(x[-1], "model.final_layernorm")
        head = "model.embed_tokens.weight" if fields["tie_word_embeddings"] else "lm_head.weight"
        logits = weights[head] @ x / fields["mup_width_multiplier"]
        logits[fields["dummy_token_indices"]] = -torch.inf
        return logits

    def attention(self, x: torch.Tensor, name: str, cos: torch.Tensor, sin: torch.Tensor, dense: bool) -> torch.Tensor:
        count, group = len(x), self.heads // self.kv_heads
        rows = self.linear(x, f"{name}.query_key_value").view(count, self.kv_heads, group + 2, self.head_dim)
        outputs = []
        for head in range(self.heads):
            own = rows[:, head // group]
            query, key = (turn(part, cos, sin) for part in (own[:, head % group], own[:, group]))
            scores = query @ key.T * self.fields["mup_attn_multiplier"] / self.head_dim
            seen = [[k <= q and (dense or self.sees(head, q, k)) for k in range(count)] for q in range(count)]
            outputs.append(scores.masked_fill(~torch.tensor(seen), -torch.inf).softmax(-1) @ own[:, group + 1])
        return self.linear(torch.cat(outputs, dim=1), f"{name}.dense")

    def sees(self, head: int, query: int, key: int) -> bool:
        """Blocks near by, and of the others every ``stride``-th, shifted from head to head."""
        block, stride = self.fields["blocksparse_block_size"], self.fields["blocksparse_vert_stride"]
        step = 0 if self.fields["blocksparse_homo_head_pattern"] else max(1, stride // self.heads)
        near = query // block - key // block < self.fields["blocksparse_num_local_blocks"]
        return near or (key // block + head * step + 1) % stride == 0

    def rotations(self, count: int, num_prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[tokens, head_dim / 2]`` each."""
        scaling, half = self.fields.get("rope_scaling"), self.head_dim // 2
        plain = self.fields["rope_embedding_base"] ** (torch.arange(half) / half)
        rows = []
        for position in range(count):
            multiplier, factors = 1.0, torch.ones(half)
            if scaling:
                original = scaling["original_max_position_embeddings"]
                kind = "long" if max(num_prompt, position + 1) > original else "short"
                factors, multiplier = torch.tensor(scaling[f"{kind}_factor"]), scaling.get(f"{kind}_mscale", 1.0)
                if kind == "long" and "long_mscale" not in scaling:
                    stretch = self.fields["max_position_embeddings"] / original
                    multiplier = math.sqrt(1 + math.log(stretch) / math.log(original))
            angles = position / (factors * plain)
            rows.append((angles.cos() * multiplier, angles.sin() * multiplier))
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """New tokens, the end token left out."""
        tokens = list(prompt)
        for _ in range(max_tokens):
            best = int(self.logits(tokens, len(prompt)).argmax())
            if best == self.fields["eos_token_id"]:
                break
            tokens.append(best)
        return tokens[len(prompt) :]


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
