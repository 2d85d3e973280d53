"""Names of KV blocks: what a block holds follows from its tokens and all tokens before it. Pure.

Routers compute the same names to know which replica holds a prompt's prefix, so the bytes are fixed:

- A chain begins with its root, ``SHA-256("llm-cluster/kv-block/1" || variant || salt)``. ``variant`` is an unsigned
  64-bit little-endian integer, ``salt`` any number of bytes.
- Block ``i`` of a chain is ``SHA-256(parent || tokens)``. ``parent`` is the 32-byte name of block ``i - 1``, or the
  root for the first; ``tokens`` are the token ids of this block, each an unsigned 32-bit little-endian integer.

Only full blocks have a name. The salt keeps tenants apart: without it, one could time whether another's prompt is
cached. The variant keeps apart what a model computes differently from the same tokens (rotary embeddings that depend on
the length); 0 is the ordinary one. Two blocks with one name hold the same, as far as anybody can break SHA-256.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

HASH_BYTES = 32
_MAGIC = b"llm-cluster/kv-block/1"
_VARIANT = struct.Struct("<Q")


def root_hash(salt: bytes = b"", variant: int = 0) -> bytes:
    """The parent of a chain's first block; ``variant`` in 0 .. 2**64 - 1."""
    return sha256(_MAGIC + _VARIANT.pack(variant) + salt).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of the block that holds ``token_ids`` (each below 2**32) behind the block named ``parent``."""
    return sha256(parent + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


def block_hashes(token_ids: Sequence[int], block_size: int, salt: bytes = b"", variant: int = 0) -> list[bytes]:
    """The names of all full blocks of a sequence, in order."""
    parent, names = root_hash(salt, variant), []
    for end in range(block_size, len(token_ids) + 1, block_size):
        parent = block_hash(parent, token_ids[end - block_size : end])
        names.append(parent)
    return names
