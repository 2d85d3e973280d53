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
    pool.share(prefix)
    pool.check([prefix, prefix])
    pool.free(prefix)
    assert pool.num_free == 1
    pool.check([prefix])
    pool.free(prefix)
    assert pool.num_free == 3


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


@pytest.mark.parametrize("live", [[], [(0, 0)], [(0,), (0,)], [(1,)], [(0,), (1,)]])
def test_check_finds_a_wrong_book(live: list[tuple[int, ...]]) -> None:
    pool = BlockPool(3, 4)
    assert pool.allocate(1) == (0,)
    pool.check([(0,)])
    with pytest.raises(AssertionError):
        pool.check(live)
