"""Which bytes of which file a rank reads, and where each of them goes: decided before a byte is read. No torch here.

A file is seen through windows of a fixed size that begin at its multiples. Every window that holds something wanted is
read once, whoever wants it: neighbouring tensors share reads, and a row longer than a window is no special case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.checkpoint.headers import TensorHeader
from cluster.checkpoint.splits import Pieces
from cluster.engine.model.shards import Shard

WINDOW_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Strip:
    """A slice of a tensor seen as a matrix of ``width`` columns: the rows in ``rows``, of each those in ``columns``."""

    rows: Pieces
    columns: Pieces
    width: int

    @property
    def kept_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)

    @property
    def kept_columns(self) -> int:
        return sum(stop - start for start, stop in self.columns)

    def between(self, first: int, last: int) -> Strip:
        """The kept rows number ``first`` to ``last`` alone."""
        found, before = [], 0
        for start, stop in self.rows:
            a, b = max(start, start + first - before), min(stop, start + last - before)
            if a < b:
                found.append((a, b))
            before += stop - start
        return Strip(tuple(found), self.columns, self.width)

    def flat(self) -> Strip:
        """The same elements as one column, when every row is whole."""
        assert self.columns == ((0, self.width),), self
        return Strip(tuple((a * self.width, b * self.width) for a, b in self.rows), ((0, 1),), 1)


def strip_of(shape: tuple[int, ...], shard: Shard) -> Strip:
    """``shard`` of a tensor of ``shape``: all dimensions but the last are rows, a vector is a column."""
    rows, width = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
    return Strip(
        ((0, rows),) if shard.rows is None else shard.rows,
        ((0, width),) if shard.columns is None else shard.columns,
        width,
    )


@dataclass(frozen=True, slots=True)
class Part:
    """Elements ``first`` to ``last`` of a tensor, which lie in one window and in one range of its strip's rows.

    ``index``: of the strip in the list that was planned. ``shift``: what to add to a row of the tensor to get the
    row of the target.
    """

    index: int
    first: int
    last: int
    shift: int


@dataclass(slots=True)
class Window:
    """Bytes ``low`` to ``high`` of ``source``, a file or a tensor that is made up; ``start``: where the grid begins it.

    ``chunk``: its number among the file's digests, None when nothing is to be compared.
    """

    source: Path | TensorHeader
    start: int
    low: int
    high: int
    header: TensorHeader
    chunk: int | None = None
    parts: list[Part] = field(default_factory=list)


def plan_windows(wanted: list[tuple[TensorHeader, Strip]], itemsizes: list[int]) -> list[Window]:
    """The windows to read, in the order of files and offsets. Element sizes are in bytes."""
    windows: dict[tuple[str, int, int], Window] = {}
    for index, (header, strip) in enumerate(wanted):
        for first, last, shift in _row_ranges(strip):
            for window, a, b in _windows_over(
                windows, header, itemsizes[index], first * strip.width, last * strip.width
            ):
                window.parts.append(Part(index, a, b, shift))
    return [windows[key] for key in sorted(windows)]


def take_turns(windows: list[Window], shared: list[bool], rank: int, ranks: int, streams: int) -> list[Window]:
    """``windows`` in the order in which ``rank`` of ``ranks`` that read at the same time shall read them.

    ``shared``: of each, whether all of them read it. Of those each begins with others, as many as it has ``streams``,
    so that one fills the page cache where nobody waits, and finds there what the others filled. They stay within
    ``ranks * streams`` of their order: that many are in the cache and not yet read by all.
    """
    places, ordered = [place for place, is_shared in enumerate(shared) if is_shared], list(windows)
    for first in range(0, len(places), ranks * streams):
        block = places[first : first + ranks * streams]
        turn = rank * streams % len(block)
        for place, taken in zip(block, block[turn:] + block[:turn], strict=True):
            ordered[place] = windows[taken]
    return ordered


def rectangles(part: Part, strip: Strip) -> Iterator[tuple[int, int, int, int]]:
    """``part`` as at most three blocks (first row, last row, first column, last column), rows of the tensor."""
    width = strip.width
    (row, column), (last_row, last_column) = divmod(part.first, width), divmod(part.last, width)
    if row == last_row:
        yield row, row + 1, column, last_column
        return
    if column:
        yield row, row + 1, column, width
        row += 1
    if row < last_row:
        yield row, last_row, 0, width
    if last_column:
        yield last_row, last_row + 1, 0, last_column


def _row_ranges(strip: Strip) -> Iterator[tuple[int, int, int]]:
    """(first row, last row, shift) of every range that keeps something."""
    filled = 0
    for start, stop in strip.rows:
        if stop > start and strip.width and strip.kept_columns:
            yield start, stop, filled - start
        filled += stop - start


def _windows_over(
    windows: dict[tuple[str, int, int], Window], header: TensorHeader, itemsize: int, first: int, last: int
) -> Iterator[tuple[Window, int, int]]:
    """The windows that hold elements ``first`` to ``last``, each with its part of them."""
    size = header.digests.chunk_bytes if header.digests else WINDOW_BYTES
    # A tensor that does not lie at a multiple of its elements has a grid of its own: no element is ever cut in two.
    misfit = header.offset % itemsize
    low, high = header.offset + first * itemsize, header.offset + last * itemsize
    for start in range((low - misfit) // size * size + misfit, high, size):
        window = _window(windows, header, start, misfit)
        a, b = max(low, start), min(high, start + size)
        if window.chunk is None:
            window.low, window.high = min(window.low, a), max(window.high, b)
        yield window, (a - header.offset) // itemsize, (b - header.offset) // itemsize
    if header.digests and misfit:  # those windows straddle chunks: the chunks are read as well, to be compared
        for start in range(low // size * size, high, size):
            _window(windows, header, start, 0)


def _window(windows: dict[tuple[str, int, int], Window], header: TensorHeader, start: int, misfit: int) -> Window:
    dummy = header.dummy_key is not None
    key = (header.name if dummy else str(header.file), start, misfit)
    if key not in windows:
        window = Window(header if dummy else header.file, start, math.inf, 0, header)  # type: ignore[arg-type]
        if header.digests and not misfit:
            digests = header.digests
            window.low, window.high = start, min(start + digests.chunk_bytes, digests.size)
            window.chunk = start // digests.chunk_bytes
        windows[key] = window
    return windows[key]
