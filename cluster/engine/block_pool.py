"""Who holds which KV block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks ``0 .. num_blocks - 1`` of ``block_size`` tokens each, counted by reference.

    A block is free while nobody holds it. ``allocate`` hands out blocks with one holder each; ``share`` adds
    a holder; ``free`` takes one away. Every operation costs O(1) per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1, num_blocks
        assert block_size >= 1, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> tuple[int, ...]:
        """``count`` free blocks, now held once each; the caller has looked at ``num_free``."""
        assert 0 <= count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        taken = tuple(self._free.pop() for _ in range(count))
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more holder for blocks that are in use."""
        for block in block_ids:
            assert self._holders[block] > 0, f"block {block} is free and cannot be shared"
            self._holders[block] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """One holder less; a block that nobody holds is free."""
        for block in block_ids:
            assert self._holders[block] > 0, f"block {block} is freed twice"
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def check(self, live: Iterable[Sequence[int]]) -> None:
        """Every invariant, given the block lists of all holders. O(blocks): for tests and post-mortems."""
        held: Counter[int] = Counter()
        for blocks in live:
            assert len(set(blocks)) == len(blocks), f"a holder names a block twice: {blocks}"
            held.update(blocks)
        assert len(set(self._free)) == len(self._free), "a block is in the free list twice"
        assert len(self._free) + len(held) == self.num_blocks, (
            f"{len(self._free)} free and {len(held)} held blocks do not make {self.num_blocks}"
        )
        for block, holders in enumerate(self._holders):
            assert holders == held[block], f"block {block} counts {holders} holders and has {held[block]}"
        assert all(not self._holders[block] for block in self._free), "a free block is held"
