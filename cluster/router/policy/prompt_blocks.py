"""One prompt as prefix caches know it. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cluster.domain.block_hash import LeadingNames


class PromptBlocks:
    """The names of a prompt's blocks, each computed once for all attempts of its request, when somebody asks."""

    __slots__ = ("_leading", "_salt", "_tokens")

    def __init__(self, tokens: Sequence[int], salt: str = "") -> None:
        self._tokens = tokens
        self._salt = salt.encode()
        self._leading: LeadingNames | None = None

    def leading(self, block_size: int) -> LeadingNames:
        if self._leading is None or self._leading.block_size != block_size:
            self._leading = LeadingNames(self._tokens, block_size, self._salt)
        return self._leading

    def key(self, session_key: str, block_size: int) -> int:
        """64 bits that are the same for all requests of one conversation.

        They follow from its ``session_key``, or where there is none from the salt and the first block's tokens.
        """
        if session_key:
            return key_of(session_key.encode())
        first = b",".join(b"%d" % token for token in self._tokens[:block_size])
        return key_of(b"\0" + self._salt + b"\0" + first)


def key_of(text: bytes) -> int:
    """64 bits that differ for different texts and are the same in every process."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
