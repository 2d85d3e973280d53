"""Writes tiny checkpoints with the standard library alone, damaged ones included."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 40,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16", "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


def header_json(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", item: int = 2) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return entries


def write_raw(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    entries = header_json(shapes)
    size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    write_raw(file, json.dumps(entries | {"__metadata__": {"format": "pt"}}).encode(), bytes(size))


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], files: int = 1
) -> Path:
    """``shapes`` round robin over ``files`` shards, with an index when there are two or more."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if files == 1:
        write_safetensors(directory / "model.safetensors", shapes)
        return directory
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    weight_map = {tensor: names[i % files] for i, tensor in enumerate(shapes)}
    for name in names:
        write_safetensors(directory / name, {t: s for t, s in shapes.items() if weight_map[t] == name})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
