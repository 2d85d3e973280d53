"""Names of KV blocks: what a block holds follows from its tokens and all tokens before it. Pure.

Routers compute the same names to know which replica holds a prompt's prefix, so the bytes are fixed:

- A chain begins with its root, ``SHA-256("llm-cluster/kv-block/1" || variant || salt)``. ``variant`` is an unsigned
  64-bit little-endian integer, ``salt`` any number of bytes.
- Block ``i`` of a chain is ``SHA-256(parent || tokens)``. ``parent`` is the 32-byte name of block ``i - 1``, or the
  root for the first; ``tokens`` are the token ids of this block, each an unsigned 32-bit little-endian integer.

Only full blocks have a name. The salt keeps tenants apart: without it, one could time whether another's prompt is
cached. The variant keeps apart what a model computes differently from the same tokens (rotary embeddings that depend on
the length); 0 is the ordinary one. Two blocks with one name hold the same, as far as anybody can break SHA-256.

Replicas tell routers which blocks they hold by the first 8 bytes of the name (``short_name``). Two blocks of a million
share those with a probability of 3e-8; a router would then expect a hit that does not come.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import overload

HASH_BYTES = 32
_MAGIC = b"llm-cluster/kv-block/1"
_VARIANT = struct.Struct("<Q")
_SHORT = struct.Struct("<Q")
_TOKEN_BYTES = 4


@lru_cache(maxsize=1024)  # of salts, which are few and used again and again
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


def short_name(name: bytes) -> int:
    """The first 8 bytes of a block's name as a little-endian integer: what a router knows it by."""
    return int(_SHORT.unpack_from(name)[0])


class LeadingNames(Sequence[int]):
    """The short names of all full blocks of a prompt, in order; each is computed when it is first asked for.

    They are those of variant 0. A replica that computes a long prompt in another one (rotary embeddings that depend on
    the length) holds other names: the prompt then looks as if nobody had cached it, which costs affinity and nothing
    else. Tokens are below 2**32. About 0.7 us for each block, once.
    """

    __slots__ = ("_names", "_num_tokens", "_parent", "_tokens", "block_size")

    def __init__(self, token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> None:
        packed = array("I", token_ids)
        assert packed.itemsize == _TOKEN_BYTES
        if sys.byteorder == "big":
            packed.byteswap()
        self.block_size = block_size
        self._num_tokens = len(packed)
        self._tokens = packed.tobytes()
        self._parent = root_hash(salt)
        self._names: list[int] = []

    def __len__(self) -> int:
        return self._num_tokens // self.block_size

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        while len(self._names) <= position:
            self._compute_next()
        return self._names[position]

    def __iter__(self) -> Iterator[int]:
        names = self._names
        for position in range(len(self)):
            if position == len(names):
                self._compute_next()
            yield names[position]

    def cached_tokens(self, num_blocks: int) -> int:
        """Tokens that need not be computed where the first ``num_blocks`` blocks are cached.

        The block of the last token is computed in any case, since that token's logits are wanted.
        """
        return min(num_blocks, max(0, self._num_tokens - 1) // self.block_size) * self.block_size

    def _compute_next(self) -> None:
        size = self.block_size * _TOKEN_BYTES
        start = len(self._names) * size
        self._parent = sha256(self._parent + self._tokens[start : start + size]).digest()
        self._names.append(short_name(self._parent))
