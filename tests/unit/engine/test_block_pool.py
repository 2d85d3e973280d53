from __future__ import annotations

import pytest

from cluster.engine.block_pool import BlockPool


def test_every_block_is_handed_out_once_and_comes_back() -> None:
    pool = BlockPool(5, 4)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 5)
    pool.check([first, second])
    pool.free(first)
    assert (pool.num_free, pool.num_used) == (2, 3)
    pool.check([second])
    pool.free(second)
    pool.check([])
    assert pool.num_free == 5


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(3, 4)
    prefix = pool.allocate(2)
    for block in prefix:
        pool.put_name(block, bytes([block]))
    pool.share(prefix)
    pool.check([prefix, prefix])
    pool.free(prefix)
    assert pool.num_free == 1
    pool.check([prefix])
    pool.free(prefix)
    assert (pool.num_free, pool.num_idle) == (3, 2)
    pool.check([])


def test_an_idle_block_is_found_until_it_is_needed_and_blank_ones_go_first() -> None:
    pool = BlockPool(3, 4)
    (block,) = pool.allocate(1)
    pool.put_name(block, b"a")
    pool.free([block])
    others = pool.allocate(2)
    assert (pool.find(b"a"), block in others) == (block, False)
    pool.share([block])
    pool.check([[block], others])
    pool.free([block])
    assert pool.allocate(1) == [block]
    assert pool.find(b"a") is None
    pool.check([[block], others])


def test_the_longest_idle_goes_first_and_of_a_chain_its_tail() -> None:
    pool = BlockPool(6, 4)
    old, young = pool.allocate(3), pool.allocate(3)
    for block in (*old, *young):
        pool.put_name(block, bytes([block]))
    pool.free(old)
    pool.free(young)
    pool.share(old[:1])  # used again: now the youngest
    pool.free(old[:1])
    assert [pool.allocate(1)[0] for _ in range(6)] == [old[2], old[1], young[2], young[1], young[0], old[0]]


def test_a_name_belongs_to_the_first_block_that_got_it() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(2)
    pool.put_name(first, b"a")
    pool.put_name(second, b"a")
    assert (pool.find(b"a"), pool.name_of(second)) == (first, None)
    pool.free([second])
    assert pool.num_idle == 0
    pool.check([[first]])


def test_a_recorder_hears_what_can_be_found() -> None:
    heard: list[tuple[str, bytes, int]] = []

    class Recorder:
        def stored(self, name: bytes, block: int) -> None:
            heard.append(("stored", name, block))

        def removed(self, name: bytes, block: int) -> None:
            heard.append(("removed", name, block))

    pool = BlockPool(2, 4, Recorder())
    first, second = pool.allocate(2)
    pool.put_name(first, b"a")
    pool.put_name(second, b"a")
    pool.free([first, second])
    pool.allocate(2)
    assert heard == [("stored", b"a", first), ("removed", b"a", first)]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockPool(1, 4).blocks_for(tokens) == blocks


def test_misuse_is_loud() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="2 blocks wanted, 1 free"):
        pool.allocate(2)
    pool.free((block,))
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free((block,))
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share((block,))
    with pytest.raises(AssertionError, match="is free and gets a name"):
        pool.put_name(block, b"a")
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share((block,))
    pool.put_name(block, b"a")
    with pytest.raises(AssertionError, match="has a name already"):
        pool.put_name(block, b"b")


@pytest.mark.parametrize("live", [[], [(0, 0)], [(0,), (0,)], [(1,)], [(0,), (1,)]])
def test_check_finds_a_wrong_book(live: list[tuple[int, ...]]) -> None:
    pool = BlockPool(3, 4)
    assert pool.allocate(1) == [0]
    pool.check([(0,)])
    with pytest.raises(AssertionError):
        pool.check(live)
