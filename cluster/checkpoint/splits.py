"""How tensor parallelism cuts dimensions: the one set of rules for the planner's ledger and for the engine.

Sizes are DeepSpeed's (``deepspeed/module_inject/tp_shard.py`` of 0.19.8) wherever DeepSpeed has an answer: whole KV
heads, the first ranks taking one more; everything else by grains, what is left over to the last rank. Where there are
more ranks than KV heads DeepSpeed would leave ranks idle; here each KV head is held by several ranks, which share its
query heads, so that every rank has exactly one KV head.

Neither torch nor DeepSpeed is imported here; a test compares both for every published shape.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.domain.parallel_layout import grain_size

Pieces = tuple[tuple[int, int], ...]


def even_shares(total: int, parts: int) -> tuple[int, ...]:
    """``total`` things among ``parts``, the first ones taking one more."""
    return tuple(total // parts + (index < total % parts) for index in range(parts))


def shard_sizes(total: int, tensor_parallel_size: int) -> tuple[int, ...]:
    """How many of ``total`` rows or columns each rank gets, by grains; they sum to ``total``."""
    grain = grain_size(total, tensor_parallel_size)
    grains, rest = divmod(total, grain)
    sizes = [share * grain for share in even_shares(grains, tensor_parallel_size)]
    sizes[-1] += rest
    return tuple(sizes)


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads of one layer that one rank has; both ranges are of the unsharded model."""

    heads: range
    kv_heads: range


@functools.lru_cache(maxsize=1024)
def head_shares(num_heads: int, num_kv_heads: int, tensor_parallel_size: int) -> tuple[HeadShare, ...]:
    """Every rank's heads; a KV head and the query heads that use it are never apart.

    More ranks than KV heads: each KV head on tp // kv or one more ranks, its query heads shared out among them. More
    ranks than query heads cannot be served.
    """
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    assert tensor_parallel_size <= num_heads, (tensor_parallel_size, num_heads)
    group = num_heads // num_kv_heads
    shares = []
    if tensor_parallel_size <= num_kv_heads:
        first = 0
        for count in even_shares(num_kv_heads, tensor_parallel_size):
            last = first + count
            shares.append(HeadShare(range(first * group, last * group), range(first, last)))
            first = last
        return tuple(shares)
    for kv_head, sharers in enumerate(even_shares(tensor_parallel_size, num_kv_heads)):
        first = kv_head * group
        for count in even_shares(group, sharers):
            shares.append(HeadShare(range(first, first + count), range(kv_head, kv_head + 1)))
            first += count
    return tuple(shares)


class HeadOrder(enum.StrEnum):
    """How heads lie along a dimension."""

    QUERY = "query"  # query heads
    KV = "kv"  # KV heads
    CONCATENATED = "concatenated"  # all query heads, all key heads, all value heads
    GROUPED = "grouped"  # for each KV head: its query heads, its key, its value


@dataclass(frozen=True, slots=True)
class Whole:
    """Every rank holds the tensor. ``counts_once``: a bias inside of a sum over ranks; all but the first hold zeros."""

    counts_once: bool = False

    @property
    def dim(self) -> None:
        return None

    @property
    def reduced(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class HeadCut:
    """Dimension ``dim`` is made of heads, ``unit`` rows or columns each.

    ``reduced``: the dimension is summed over, so that the ranks' products must be added.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    order: HeadOrder
    unit: int
    reduced: bool = False

    def pieces(self, tensor_parallel_size: int) -> tuple[Pieces, ...]:
        """What each rank keeps, as ranges in the order in which they are concatenated."""
        shares = head_shares(self.num_heads, self.num_kv_heads, tensor_parallel_size)
        return tuple(self._scaled(self._units(share)) for share in shares)

    def _units(self, share: HeadShare) -> Iterator[tuple[int, int]]:
        heads, kv_heads = (share.heads.start, share.heads.stop), (share.kv_heads.start, share.kv_heads.stop)
        if self.order is HeadOrder.QUERY:
            yield heads
        elif self.order is HeadOrder.KV:
            yield kv_heads
        elif self.order is HeadOrder.CONCATENATED:
            yield heads
            for before in (self.num_heads, self.num_heads + self.num_kv_heads):
                yield before + kv_heads[0], before + kv_heads[1]
        else:
            group = self.num_heads // self.num_kv_heads
            for kv_head in share.kv_heads:
                base = kv_head * 2  # keys and values of the groups before
                yield base + max(heads[0], kv_head * group), base + min(heads[1], (kv_head + 1) * group)
                yield base + (kv_head + 1) * group, base + (kv_head + 1) * group + 2

    def _scaled(self, ranges: Iterable[tuple[int, int]]) -> Pieces:
        return _merged((start * self.unit, stop * self.unit) for start, stop in ranges)


@dataclass(frozen=True, slots=True)
class GrainCut:
    """Dimension ``dim`` is ``parts`` times ``size`` things side by side, ``unit`` rows or columns each.

    All parts are cut at the same things, so that a gate and its up projection stay together.
    """

    dim: int
    size: int
    parts: int = 1
    unit: int = 1
    reduced: bool = False

    def pieces(self, tensor_parallel_size: int) -> tuple[Pieces, ...]:
        """What each rank keeps, as ranges in the order in which they are concatenated."""
        found, first = [], 0
        for count in shard_sizes(self.size, tensor_parallel_size):
            starts = (part * self.size + first for part in range(self.parts))
            found.append(_merged((start * self.unit, (start + count) * self.unit) for start in starts))
            first += count
        return tuple(found)


Cut = Whole | HeadCut | GrainCut
WHOLE = Whole()


def _merged(ranges: Iterable[tuple[int, int]]) -> Pieces:
    """Neighbours become one range."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def cut_shape(shape: tuple[int, ...], cut: Cut, tensor_parallel_size: int, rank: int) -> tuple[int, ...]:
    """The shape of one rank's part."""
    if isinstance(cut, Whole):
        return shape
    width = sum(stop - start for start, stop in cut.pieces(tensor_parallel_size)[rank])
    return (*shape[: cut.dim], width, *shape[cut.dim + 1 :])
