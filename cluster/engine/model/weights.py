"""From safetensors to this rank's shard: every rank reads its slices and nothing else.

A few threads take window after window of the files (``engine.model.windows``), read each with ``preadv`` into a staging
buffer of their own, compare it with the manifest's digest where there is one, and copy what is wanted to where it
belongs, converting the element type on the way. Nothing is mapped; above the shard a rank holds the staging buffers.
What only this rank reads goes past a cold page cache; rows that several ranks of a node want go through it, so that
the disk delivers them once.
"""

from __future__ import annotations

import math
import mmap
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.checkpoint.headers import TensorHeader
from cluster.checkpoint.window_reader import PAGE, WindowReader
from cluster.domain.errors import CheckpointError
from cluster.engine.model import dummy_weights
from cluster.engine.model.shards import Shard
from cluster.engine.model.windows import Part, Strip, Window, plan_windows, rectangles, strip_of, take_turns

# Enough to keep a disk's queue filled while others copy and hash; each holds one window.
STREAMS = 4
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ShardRead:
    """One view to fill: ``target`` (on its device) from ``shard`` of the tensor ``header``.

    ``target`` has the shape of that slice; its leading dimensions may be merged into one. It may be any view of a
    parameter, best with unit stride in its last dimension: a parameter made of several tensors is filled by several
    reads, and one that stores its transpose by a read into ``parameter.t()``.
    """

    target: torch.Tensor
    header: TensorHeader
    shard: Shard


@dataclass(frozen=True, slots=True)
class _Job:
    """A read, made ready: ``target`` as a matrix of ``strip``'s kept rows and columns.

    ``every_row``: something of each row is kept; ``whole``: all of it.
    """

    target: torch.Tensor
    header: TensorHeader
    strip: Strip
    dtype: torch.dtype
    every_row: bool
    whole: bool


def bytes_to_read(reads: list[ShardRead]) -> int:
    """Bytes of the shard in the files' own element type: what ``progress`` adds up to."""
    strips = ((strip_of(read.header.shape, read.shard), _dtype(read.header).itemsize) for read in reads)
    return sum(strip.kept_rows * strip.kept_columns * itemsize for strip, itemsize in strips)


def load(reads: list[ShardRead], progress: Progress, *, rank: int = 0, ranks: int = 1) -> None:
    """Fills every target. ``progress`` is called, by this thread, with the number of bytes just delivered.

    ``rank`` of ``ranks``: of the group whose others read the same files now; it decides on the order alone.

    CheckpointError with the file's name when a file cannot be read, ends early or differs from the manifest, or when
    a tensor's element type is not a floating-point one that we know; the targets' contents are undefined then.
    """
    jobs = [job for read in reads for job in _jobs(read)]
    windows = plan_windows([(job.header, job.strip) for job in jobs], [job.dtype.itemsize for job in jobs])
    with ExitStack() as stack:
        stack.enter_context(_one_thread_per_copy())
        _Streams(jobs, windows, stack, rank, ranks).run(progress)


class _Streams:
    """The threads, and what they share: the windows still to read, what has been delivered, whether to stop."""

    def __init__(self, jobs: list[_Job], windows: list[Window], stack: ExitStack, rank: int, ranks: int) -> None:
        self._jobs = jobs
        self._count = min(STREAMS, len(windows))
        self._buffer_bytes = max((window.high + -window.high % PAGE - window.start for window in windows), default=0)
        # One of several ranks: the others read the tensors that are whole on each, and the rows of which each keeps a
        # strip. What a rank reads alone would only push those out of the page cache.
        self._split = not all(job.whole for job in jobs)
        shared = [self._is_shared(window) for window in windows]
        self._windows = iter(take_turns(windows, shared, rank, ranks, STREAMS))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._delivered: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._readers: dict[Path, WindowReader] = {}
        for window in windows:
            if isinstance(window.source, Path) and window.source not in self._readers:
                self._readers[window.source] = reader = WindowReader(window.source)
                stack.callback(reader.close)

    def run(self, progress: Progress) -> None:
        threads = [threading.Thread(target=self._work, name=f"load-{i}", daemon=True) for i in range(self._count)]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                told = self._delivered.get()
                if told is None:
                    running -= 1
                elif isinstance(told, int):
                    progress(told)
                else:
                    raise told
        finally:  # the files are closed next: nobody may still read
            self._stop.set()
            for thread in threads:
                thread.join()

    def _work(self) -> None:
        try:
            staging = memoryview(_staging(self._buffer_bytes))
            with torch.inference_mode():
                while (window := self._next()) is not None:
                    self._delivered.put(self._deliver(window, staging))
        except BaseException as error:  # boundary: told to the thread that waits, which raises it
            self._delivered.put(error)
        finally:
            self._delivered.put(None)

    def _next(self) -> Window | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._windows, None)

    def _is_shared(self, window: Window) -> bool:
        return self._split and any(self._jobs[part.index].every_row for part in window.parts)

    def _deliver(self, window: Window, staging: memoryview) -> int:
        """Bytes of the shard that ``window`` gave. The window's grid begins where ``staging`` does."""
        view = staging[window.low - window.start : window.high - window.start]
        if isinstance(window.source, Path):
            shared = self._is_shared(window)
            self._readers[window.source].read(staging, window.start, window.low, window.high, shared=shared)
            if window.chunk is not None and window.header.digests is not None:
                window.header.digests.check(window.source, window.chunk, view)
        else:
            dummy_weights.fill(view, window.source, window.low, _dtype(window.source))
        return sum(_keep(part, self._jobs[part.index], window, staging) for part in window.parts)


def _staging(size: int) -> mmap.mmap:
    """Memory to read into. In huge pages where there are some: direct reads have less of them to pin."""
    staging = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        staging.madvise(mmap.MADV_HUGEPAGE)
    return staging


def _keep(part: Part, job: _Job, window: Window, staging: memoryview) -> int:
    """Copies ``part`` to its place; returns how many bytes of it were wanted."""
    strip, itemsize = job.strip, job.dtype.itemsize
    begin = job.header.offset - window.start  # of the tensor, in the buffer; negative when it begins before
    kept = 0
    for row, last_row, column, last_column in rectangles(part, strip):
        rows, columns = last_row - row, last_column - column
        offset = begin + (row * strip.width + column) * itemsize
        block = torch.frombuffer(staging, dtype=job.dtype, count=rows * columns, offset=offset).view(rows, columns)
        target = job.target[row + part.shift : last_row + part.shift]
        left = 0
        for start, stop in strip.columns:
            a, b = max(start, column), min(stop, last_column)
            if a < b:
                target[:, left + a - start : left + b - start].copy_(block[:, a - column : b - column])
                kept += rows * (b - a) * itemsize
            left += stop - start
    return kept


@contextmanager
def _one_thread_per_copy() -> Iterator[None]:
    """The streams share the cores; a team of threads for each of their copies would only get in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _jobs(read: ShardRead) -> Iterator[_Job]:
    header, target = read.header, read.target
    strip, dtype = strip_of(header.shape, read.shard), _dtype(header)
    assert target.numel() == strip.kept_rows * strip.kept_columns, f"{header.name}: {target.shape} for {strip}"
    every_row = strip.kept_rows * strip.width == math.prod(header.shape)
    whole = every_row and strip.kept_columns == strip.width
    for matrix, rows in _matrices(target.unsqueeze(-1) if target.dim() == 1 else target, strip):
        if rows.columns == ((0, rows.width),) and matrix.is_contiguous():
            yield _Job(matrix.view(-1, 1), header, rows.flat(), dtype, every_row, whole)
        else:
            yield _Job(matrix, header, rows, dtype, every_row, whole)


def _matrices(target: torch.Tensor, strip: Strip) -> Iterator[tuple[torch.Tensor, Strip]]:
    """``target`` as one matrix, or as several where its leading dimensions cannot be merged, with the rows of each."""
    if not target.numel():
        return
    shape = (strip.kept_rows, strip.kept_columns)
    if target.dim() == 2 and target.shape == shape:
        yield target, strip
        return
    try:
        yield target.view(shape), strip
    except RuntimeError:  # strides that no matrix has
        count = strip.kept_rows // target.shape[0]
        for index, part in enumerate(target):
            yield from _matrices(part, strip.between(index * count, (index + 1) * count))


def _dtype(header: TensorHeader) -> torch.dtype:
    try:
        return TORCH_DTYPES[header.dtype]
    except KeyError:
        known = ", ".join(TORCH_DTYPES)
        raise CheckpointError(
            f"{header.name} in {header.file} has the element type {header.dtype}; served are {known}."
        ) from None


def require(tensors: Mapping[str, TensorHeader], name: str, alias: str | None = None) -> TensorHeader:
    """The header of ``name``, or of ``alias`` for a tied weight that the checkpoint stores under another name."""
    header = tensors.get(name) or (tensors.get(alias) if alias else None)
    if header is None:
        raise CheckpointError(f"The checkpoint lacks the tensor {name}; export the model again, completely.")
    return header
