"""Small models of transformers' families with a paged cache, and what they make of a few steps."""

from __future__ import annotations

import torch
import transformers

from cluster.engine.model import attention
from cluster.engine.model.attention import BlockTables, LayerKV, PagedKVCache, layout_step
from cluster.engine.model.tensor_parallel import TensorParallelGroup
from cluster.engine.step import SequenceKey, StepEntry

CPU = torch.device("cpu")
ALONE = TensorParallelGroup(0, 1, "gloo")
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def build(config_name, fields, dtype=torch.float32):
    """The base model, two layers whose biases and norms do something, and its cache of 16 blocks."""
    attention.register()
    config = getattr(transformers, config_name)(**fields)
    config._attn_implementation = attention.IMPLEMENTATION
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    head_dim = getattr(config, "head_dim", None) or 16
    kv = LayerKV(getattr(config, "num_key_value_heads", 4), head_dim, head_dim)
    cache = PagedKVCache({0: kv, 1: kv}, 16, 4, dtype, CPU)
    attention.install(model, cache)
    return model, cache


@torch.inference_mode()
def hidden(model, cache):
    """A prompt, then a decode beside a chunk of another prompt, then two decodes."""
    tables, seen = BlockTables(2, 8, CPU), []
    first, second = SequenceKey(0, 0), SequenceKey(0, 1)
    for entries in (
        [StepEntry(first, 1, tuple(range(7)), 0, 0, (3, 9), True, 7)],
        [StepEntry(first, 1, (5,), 7, 2, (), True, 7), StepEntry(second, 0, (8, 9, 10, 11, 12), 0, 0, (1, 2), True, 5)],
        [StepEntry(first, 1, (6,), 8, 2, (4,), True, 7), StepEntry(second, 0, (13,), 5, 2, (), True, 5)],
    ):
        tables.apply(entries)
        cache.layout = layout = layout_step(entries, tables, 4)
        output = model(input_ids=layout.token_ids[None], position_ids=layout.positions[None], use_cache=False)
        seen.append(output.last_hidden_state[0])
    return torch.cat(seen)
