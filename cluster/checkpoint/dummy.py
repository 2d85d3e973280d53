"""A checkpoint without weights: config.json says which tensors there are, a number for each says what is in it.

For measuring and trying out layouts of models that are not at hand: nothing is downloaded, no weights are read, and
every layout computes the same tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.headers import TensorHeader
from cluster.checkpoint.layout import (
    Checkpoint,
    digest_of,
    find_tokenizer_files,
    read_config,
    read_generation_config,
    refuse_custom_code,
)
from cluster.checkpoint.tensors import expected_tensors
from cluster.domain.errors import CheckpointError
from cluster.domain.model_spec import Dtype

_STORED = {Dtype.FLOAT32: ("F32", 4), Dtype.BFLOAT16: ("BF16", 2), Dtype.FLOAT16: ("F16", 2)}


def dummy_checkpoint(path: Path, seed: int) -> Checkpoint:
    """The checkpoint that ``path`` (a directory with config.json at least) would be with weights made from ``seed``.

    Weights that are there are not looked at. The element type is the config's. CheckpointError or
    UnsupportedModelError for a config from which the tensors do not follow.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give the directory that holds config.json.")
    config, generation_config = read_config(path), read_generation_config(path)
    refuse_custom_code(path, config)
    spec = model_spec(config, generation_config)
    dtype, itemsize = _STORED[spec.dtype]
    tensors = {
        tensor.name: TensorHeader(
            tensor.name, dtype, tensor.shape, path, 0, tensor.numel * itemsize, dummy_key=tensor_key(seed, tensor.name)
        )
        for tensor in expected_tensors(spec)
    }
    tokenizer_files = find_tokenizer_files(path)
    return Checkpoint(
        path=path,
        config=config,
        generation_config=generation_config,
        tensors=tensors,
        files=(),
        total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        tokenizer_files=tokenizer_files,
        digest=digest_of(path, tokenizer_files, (), extra=f"dummy weights of seed {seed}"),
    )


def tensor_key(seed: int, name: str) -> int:
    """64 bits that decide the values of the tensor ``name``."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
