"""Bytes of a file, past the page cache or through it: the same bytes."""

import errno
import fcntl
import mmap
import os
import random
from pathlib import Path

import pytest

from cluster.checkpoint import window_reader
from cluster.checkpoint.window_reader import HUGE_PAGE, PAGE, WindowReader
from cluster.domain.errors import CheckpointError

SIZE = 5 * PAGE + 123


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture
def reader(file):
    opened = WindowReader(file)
    yield opened
    opened.close()


def drop(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def file_pages():
    """Bytes of files that are mapped in this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("start", [0, PAGE, 2 * PAGE, 2])
def test_what_is_read_lies_where_it_lay(file, reader, start, cold, shared):
    content, rng = file.read_bytes(), random.Random(start)
    for _ in range(20):
        low = rng.randrange(start, SIZE)
        high = rng.choice([rng.randrange(low, SIZE) + 1, SIZE])
        buffer = memoryview(mmap.mmap(-1, 8 * PAGE))
        if cold:
            drop(file)
        reader.read(buffer, start, low, high, shared=shared)
        assert buffer[low - start : high - start] == content[low:high]


def test_the_page_cache_is_asked_and_left_alone(file, reader):
    descriptor, buffer = os.open(file, os.O_RDONLY), memoryview(mmap.mmap(-1, 8 * PAGE))
    drop(file)
    if window_reader.is_cached(descriptor, 0, 5 * PAGE):
        pytest.skip("this file system keeps its files in memory")
    reader.read(buffer, 0, 0, 5 * PAGE, shared=False)
    assert not window_reader.is_cached(descriptor, 0, 5 * PAGE)
    reader.read(buffer, 0, 0, 5 * PAGE, shared=True)
    cached = window_reader.is_cached(descriptor, 0, 5 * PAGE)
    os.close(descriptor)
    assert cached or tuple(int(n) for n in os.uname().release.split(".")[:2]) < (6, 5)


@pytest.fixture
def large(tmp_path):
    """Five huge pages and a bit, out of the cache."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(random.Random(1).randbytes(5 * HUGE_PAGE + 123))
    drop(path)
    return path


@pytest.mark.parametrize("pages", [PAGE, 16 * PAGE])
def test_what_is_shared_comes_through_huge_pages_as_it_lay(large, pages, monkeypatch):
    monkeypatch.setattr(window_reader.mmap, "PAGESIZE", pages)  # where a page is larger, in the plain way
    reader, buffer = WindowReader(large), memoryview(mmap.mmap(-1, 4 * HUGE_PAGE))
    size = large.stat().st_size
    content = {}
    for low, high in [(HUGE_PAGE + 5, 3 * HUGE_PAGE + 7), (size - HUGE_PAGE - 200, size), (0, 2 * HUGE_PAGE)]:
        reader.read(buffer, start := low - low % PAGE, low, high, shared=True)
        content[low] = bytes(buffer[low - start : high - start])
    reader.close()
    whole = large.read_bytes()
    assert all(whole[low : low + len(part)] == part for low, part in content.items())


def test_a_fill_leaves_the_bytes_in_the_cache_and_out_of_the_process(large):
    descriptor, before = os.open(large, os.O_RDONLY), file_pages()
    if window_reader.is_cached(descriptor, 0, HUGE_PAGE):
        pytest.skip("this file system keeps its files in memory")
    fill = window_reader._HugeFill(descriptor)
    fill.fill(10, HUGE_PAGE)  # not one whole huge page is wanted: more would be read than asked for
    assert not window_reader.is_cached(descriptor, 0, HUGE_PAGE)
    fill.fill(HUGE_PAGE + 10, 4 * HUGE_PAGE)
    cached, held = window_reader.is_cached(descriptor, HUGE_PAGE, 4 * HUGE_PAGE), file_pages() - before
    fill.close()
    os.close(descriptor)
    assert cached or tuple(int(n) for n in os.uname().release.split(".")[:2]) < (6, 5)
    assert held < HUGE_PAGE


def test_a_file_cut_short_under_the_reader_ends_in_an_error_not_in_a_signal(large):
    reader, buffer = WindowReader(large), memoryview(mmap.mmap(-1, 5 * HUGE_PAGE))
    os.truncate(large, HUGE_PAGE)
    with pytest.raises(CheckpointError, match=rf"ends at byte {HUGE_PAGE}, in the middle"):
        reader.read(buffer, 0, 0, 4 * HUGE_PAGE, shared=True)
    reader.close()


@pytest.mark.parametrize("refused", ["open", "direct"])
def test_a_file_system_that_refuses_is_read_plainly(file, refused, monkeypatch):
    open_, preadv = os.open, os.preadv

    def refusing_open(path, flags, *rest):
        if refused == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return open_(path, flags, *rest)

    def refusing_preadv(descriptor, buffers, offset):
        if refused == "direct" and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return preadv(descriptor, buffers, offset)

    drop(file)
    monkeypatch.setattr(window_reader.os, "open", refusing_open)
    monkeypatch.setattr(window_reader.os, "preadv", refusing_preadv)
    reader, buffer = WindowReader(file), memoryview(mmap.mmap(-1, 8 * PAGE))
    reader.read(buffer, 0, 5, SIZE - 5, shared=False)
    reader.close()
    assert buffer[5 : SIZE - 5] == file.read_bytes()[5:-5]


@pytest.mark.parametrize("shared", [False, True])
def test_short_missing_and_unreadable_files_are_named(file, reader, shared, monkeypatch):
    buffer = memoryview(mmap.mmap(-1, 8 * PAGE))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors ends at byte {SIZE}, in the middle"):
        reader.read(buffer, 0, 10, SIZE + 1, shared=shared)
    with pytest.raises(CheckpointError, match=r"y\.safetensors cannot be opened \(No such file"):
        WindowReader(file.with_name("y.safetensors"))

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(window_reader.os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read at byte \d+ \(Input/output error"):
        reader.read(buffer, 0, 10, 20, shared=shared)
