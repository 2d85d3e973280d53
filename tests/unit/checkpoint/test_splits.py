"""The split rules: every row on some rank, heads whole, replication no more than needed."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.splits import GrainCut, HeadCut, HeadOrder, Whole, cut_shape, head_shares

_HEADS = st.tuples(st.integers(1, 16), st.integers(1, 12), st.integers(1, 40))  # KV heads, query heads of each, ranks


def _ranks(heads: tuple[int, int, int]) -> tuple[int, int, int]:
    kv_heads, group, ranks = heads
    return kv_heads * group, kv_heads, min(ranks, kv_heads * group)


@given(heads=_HEADS)
def test_every_query_head_is_on_one_rank_and_its_kv_head_too(heads: tuple[int, int, int]) -> None:
    num_heads, kv_heads, ranks = _ranks(heads)
    shares = head_shares(num_heads, kv_heads, ranks)
    assert [head for share in shares for head in share.heads] == list(range(num_heads))
    group = num_heads // kv_heads
    for share in shares:
        assert len(share.heads) >= 1, "no rank idles"
        assert {head // group for head in share.heads} == set(share.kv_heads)
        # Paged attention pairs query and KV heads by division.
        assert len(share.heads) % len(share.kv_heads) == 0
    if ranks <= kv_heads:
        assert [head for share in shares for head in share.kv_heads] == list(range(kv_heads))
        sizes = [len(share.kv_heads) for share in shares]
    else:
        assert all(len(share.kv_heads) == 1 for share in shares)
        holders = Counter(share.kv_heads.start for share in shares)
        assert set(holders.values()) <= {ranks // kv_heads, ranks // kv_heads + 1}
        sizes = [len(share.heads) for share in shares if share.kv_heads.start == 0]
    assert max(sizes) - min(sizes) <= 1


@given(heads=_HEADS, unit=st.integers(1, 5), order=st.sampled_from(HeadOrder))
def test_heads_are_cut_whole_and_nothing_is_lost(heads: tuple[int, int, int], unit: int, order: HeadOrder) -> None:
    num_heads, kv_heads, ranks = _ranks(heads)
    pieces = HeadCut(0, num_heads, kv_heads, order, unit).pieces(ranks)
    count = {HeadOrder.QUERY: num_heads, HeadOrder.KV: kv_heads}.get(order, num_heads + 2 * kv_heads)
    assert all(start % unit == 0 and stop % unit == 0 and start < stop for rank in pieces for start, stop in rank)
    held = Counter(row for rank in pieces for start, stop in rank for row in range(start, stop))
    assert sorted(held) == list(range(count * unit))
    shares = head_shares(num_heads, kv_heads, ranks)
    sharers = Counter(kv_head for share in shares for kv_head in share.kv_heads)
    for row, times in held.items():
        assert times == _expected_times(row // unit, num_heads, kv_heads, order, sharers)


def _expected_times(head: int, num_heads: int, kv_heads: int, order: HeadOrder, sharers: Counter[int]) -> int:
    """How many ranks hold the ``head``-th unit: query heads one, keys and values as many as share the KV head."""
    if order is HeadOrder.QUERY or (order is HeadOrder.CONCATENATED and head < num_heads):
        return 1
    if order is HeadOrder.KV:
        return sharers[head]
    if order is HeadOrder.CONCATENATED:
        return sharers[(head - num_heads) % kv_heads]
    width = num_heads // kv_heads + 2
    return 1 if head % width < width - 2 else sharers[head // width]


@given(size=st.integers(1, 500), parts=st.integers(1, 2), unit=st.integers(1, 3), ranks=st.integers(1, 20))
def test_grains_cover_once_and_gates_stay_with_their_ups(size: int, parts: int, unit: int, ranks: int) -> None:
    pieces = GrainCut(0, size, parts, unit).pieces(ranks)
    rows = [[row for start, stop in rank for row in range(start, stop)] for rank in pieces]
    assert sorted(row for rank in rows for row in rank) == list(range(parts * size * unit))
    for rank in rows:
        width = len(rank) // parts
        things = [[row // unit % size for row in rank[part * width : (part + 1) * width]] for part in range(parts)]
        assert all(part == things[0] for part in things)


def test_grouped_heads_of_a_shared_kv_head_keep_its_key_and_value() -> None:
    """Falcon's layout: four query heads, a key and a value for each of two KV heads, over four ranks."""
    pieces = HeadCut(0, 8, 2, HeadOrder.GROUPED, 10).pieces(4)
    assert pieces == (((0, 20), (40, 60)), ((20, 60),), ((60, 80), (100, 120)), ((80, 120),))


def test_the_shape_of_a_part() -> None:
    assert cut_shape((8, 6), Whole(), 2, 1) == (8, 6)
    assert cut_shape((4, 12, 5), GrainCut(1, 6, parts=2), 3, 2) == (4, 4, 5)
