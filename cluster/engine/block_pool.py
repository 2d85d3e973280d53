"""Who holds which KV block, and what the blocks hold that nobody needs right now."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol


class BlockRecorder(Protocol):
    """Hears which contents can be found here; called in the order of events, from the scheduler's thread."""

    def stored(self, name: bytes, block: int) -> None: ...
    def removed(self, name: bytes, block: int) -> None: ...


class BlockPool:
    """Blocks ``0 .. num_blocks - 1`` of ``block_size`` tokens each, counted by reference.

    A block is free while nobody holds it. ``allocate`` hands out blocks with one holder each; ``share`` adds
    a holder; ``free`` takes one away. A block whose content is final may get a name (``put_name``): it can be found and
    shared by it, and stays so when nobody holds it any more, until ``allocate`` needs it. Then the block that has been
    idle longest goes first. Every operation costs O(1) per block.
    """

    def __init__(self, num_blocks: int, block_size: int, recorder: BlockRecorder | None = None) -> None:
        assert num_blocks >= 1, num_blocks
        assert block_size >= 1, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._recorder = recorder
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, nameless
        self._idle: OrderedDict[int, None] = OrderedDict()  # free, named; longest idle first
        self._holders = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._found: dict[bytes, int] = {}  # name -> block

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, named ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_idle(self) -> int:
        """Free blocks that can still be found by name."""
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """``count`` free blocks, now nameless and held once each; the caller has looked at ``num_free``."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        taken = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more holder for named blocks, held or idle."""
        for block in block_ids:
            assert self._names[block] is not None, f"block {block} has no name and cannot be shared"
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """One holder less. Blocks come in a sequence's order; its last ones are the first to be forgotten."""
        for block in reversed(block_ids):
            holders = self._holders[block]
            assert holders > 0, f"block {block} is freed twice"
            self._holders[block] = holders - 1
            if holders > 1:
                continue
            if self._names[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    # ---- names

    def put_name(self, block: int, name: bytes) -> None:
        """Names a held block's final content. Without effect where another block has that name already."""
        assert self._holders[block] > 0, f"block {block} is free and gets a name"
        assert self._names[block] is None, f"block {block} has a name already"
        if name in self._found:
            return
        self._names[block] = name
        self._found[name] = block
        if self._recorder is not None:
            self._recorder.stored(name, block)

    def find(self, name: bytes) -> int | None:
        """The block of that name."""
        return self._found.get(name)

    def name_of(self, block: int) -> bytes | None:
        return self._names[block]

    def num_held(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks somebody holds."""
        return sum(1 for block in block_ids if self._holders[block])

    def _evict(self) -> int:
        """Forgets the content of the block that has been idle longest."""
        block, _ = self._idle.popitem(last=False)
        name = self._names[block]
        assert name is not None, f"block {block} idles without a name"
        self._names[block] = None
        del self._found[name]
        if self._recorder is not None:
            self._recorder.removed(name, block)
        return block

    def check(self, live: Iterable[Sequence[int]]) -> None:
        """Every invariant, given the block lists of all holders. O(blocks): for tests and post-mortems."""
        held: Counter[int] = Counter()
        for blocks in live:
            assert len(set(blocks)) == len(blocks), f"a holder names a block twice: {blocks}"
            held.update(blocks)
        free = [*self._blank, *self._idle]
        assert len(set(free)) == len(free), "a block is free twice"
        assert len(free) + len(held) == self.num_blocks, (
            f"{len(free)} free and {len(held)} held blocks do not make {self.num_blocks}"
        )
        for block, holders in enumerate(self._holders):
            assert holders == held[block], f"block {block} counts {holders} holders and has {held[block]}"
            assert holders < 2 or self._names[block] is not None, f"block {block} is shared without a name"
        assert all(not self._holders[block] for block in free), "a free block is held"
        assert all(self._names[block] is None for block in self._blank), "a blank block has a name"
        assert all(self._names[block] is not None for block in self._idle), "an idle block has no name"
        named = {name: block for block, name in enumerate(self._names) if name is not None}
        assert named == self._found, "a name leads to another block"
