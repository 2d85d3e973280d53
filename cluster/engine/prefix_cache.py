"""Which blocks hold a sequence's first tokens already: blocks by the hash of all tokens up to their end."""

from __future__ import annotations

from cluster.domain.block_hash import block_hash, root_hash
from cluster.domain.model_spec import RopeByLength
from cluster.engine.block_pool import BlockPool
from cluster.engine.sequence import Sequence


class PrefixCache:
    """Finds and names blocks of ``pool``, if ``enabled``. Nothing is hashed twice: a sequence carries its chain along.

    ``queries`` and ``hits`` count tokens: those that were known when a sequence was looked up, and those of them that
    need not be computed.
    """

    def __init__(self, pool: BlockPool, rope_by_length: RopeByLength | None, *, enabled: bool = True) -> None:
        self._pool = pool
        self._enabled = enabled
        self._rope = rope_by_length
        self.queries = 0
        self.hits = 0

    def lookup(self, sequence: Sequence) -> list[int]:
        """Blocks with the longest known beginning of ``sequence``, to be shared at once.

        At least one known token is always left out, since its logits are wanted. It then begins a block of the
        sequence's own, so that nobody writes to a shared one.
        """
        if not self._enabled:
            return []
        variant = self._variant(sequence)
        if not sequence.hash_chain or sequence.hash_variant != variant:
            sequence.hash_chain = [root_hash(sequence.cache_salt, variant)]
            sequence.hash_variant = variant
        found: list[int] = []
        for index in range((sequence.num_tokens - 1) // self._pool.block_size):
            block = self._pool.find(self._hash(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def count(self, sequence: Sequence, num_hits: int) -> None:
        """Books one lookup that was acted on; ``num_hits`` in tokens."""
        if self._enabled:
            self.queries += sequence.num_tokens
            self.hits += num_hits

    def record(self, sequence: Sequence) -> None:
        """Names the blocks that have become full of computed tokens."""
        first, end = sequence.num_recorded, sequence.num_computed // self._pool.block_size
        for index in range(first, end) if self._enabled else ():
            self._pool.put_name(sequence.block_ids[index], self._hash(sequence, index))
        sequence.num_recorded = end

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """Name of the sequence's block ``index``, all of whose tokens are known."""
        chain, size = sequence.hash_chain, self._pool.block_size
        while len(chain) <= index + 1:
            start = (len(chain) - 1) * size
            chain.append(block_hash(chain[-1], sequence.tokens(start, start + size)))
        return chain[index + 1]

    def _variant(self, sequence: Sequence) -> int:
        """Sequences of different variants compute different keys from the same tokens."""
        if self._rope is None:
            return 0
        if self._rope.kind == "switch":
            return int(sequence.num_tokens > self._rope.original_len)
        # A prompt within the original length leaves each later token a function of its own position alone.
        num_prompt = len(sequence.prompt_token_ids)
        return num_prompt if num_prompt > self._rope.original_len else 0
