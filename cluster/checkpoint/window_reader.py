"""Reads parts of files at the rate of the disk: past the page cache where it is cold, from it where it is warm.

A read that goes through the page cache costs a second copy and fresh pages for it, which a processor that is busy
filling memory can not spare. So: what the cache holds is taken from there, the rest is read with ``O_DIRECT`` into the
caller's pages. Where the file system refuses that, and for what several readers share, the plain road is taken; what
they share is put into the cache in huge pages first (``_HugeFill``).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

from cluster.domain.errors import CheckpointError

PAGE = 4096
_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
# cachestat(2), Linux 6.5. A read with RWF_NOWAIT would ask as well, but it starts to read what it does not find.
_CACHESTAT = 451
# madvise(2), MADV_POPULATE_READ: Linux 5.14. Called through ctypes because mmap.madvise() keeps the interpreter's lock.
_POPULATE_READ = 22
HUGE_PAGE = 2 * 2**20
_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


class WindowReader:
    """One file, opened. Threads may read at the same time, each into its own buffer.

    CheckpointError with the file's name when it cannot be opened or read, or ends too early.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._cached = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be opened ({error.strerror}); check that it is there.") from None
        # The callers' threads are the read-ahead; the kernel's own, for one reader, would issue smaller requests.
        os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            self._direct: int | None = os.open(file, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            self._direct = None
        self._fill = _HugeFill(self._cached)

    def close(self) -> None:
        self._fill.close()
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, buffer: memoryview, start: int, low: int, high: int, *, shared: bool) -> None:
        """Puts bytes ``low`` to ``high`` where they lie in ``buffer``, whose first byte is the file's ``start``.

        Bytes around them, within the same pages, may be overwritten. ``shared``: others on this machine read them too,
        so they shall stay in the page cache.
        """
        first, last = low - low % PAGE, high + -high % PAGE
        paged = start % PAGE == 0 and last - start <= len(buffer)
        filled = low
        if paged and not shared and self._direct is not None and not is_cached(self._cached, first, last):
            filled = max(low, self._read_past_cache(self._direct, buffer[first - start : last - start], first, high))
        elif shared and not is_cached(self._cached, first, last):
            self._fill.fill(low, high)
        while filled < high:
            count = self._call(self._cached, buffer[filled - start : high - start], filled)
            if count == 0:
                raise CheckpointError(
                    f"{self._file} ends at byte {filled}, in the middle of its tensors; "
                    "copy or download the file again."
                )
            filled += count

    def _read_past_cache(self, direct: int, pages: memoryview, first: int, high: int) -> int:
        """Reads whole pages; returns up to where it came: the file's end, or where the kernel refuses this way."""
        filled = 0
        while first + filled < high and filled % PAGE == 0:
            try:
                count = os.preadv(direct, [pages[filled:]], first + filled)
            except OSError as error:
                if error.errno in _REFUSED:
                    break
                raise self._unreadable(first + filled, error) from None
            if count == 0:
                break
            filled += count
        return first + filled

    def _call(self, descriptor: int, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise self._unreadable(offset, error) from None

    def _unreadable(self, offset: int, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._file} cannot be read at byte {offset} ({error.strerror}); "
            "check the disk, then copy or download the file again."
        )


class _HugeFill:
    """Puts parts of a file into the page cache in huge pages, where kernel and file system have them there.

    ``read``, and the kernel's read-ahead for it, take single pages for whoever does not read in order: more CPU
    time, for whoever fills them and for whoever copies them. A fault in a mapping that asked for huge pages
    (``do_sync_mmap_readahead`` in mm/filemap.c, Linux 5.18) takes 2 MiB at a time; of ext4 since 6.16. Nothing is read
    through the mapping: there a disk that fails would end the process, and in ``read`` it ends in an error.
    """

    def __init__(self, descriptor: int) -> None:
        self._size = os.fstat(descriptor).st_size
        self._address: int | None = None
        if mmap.PAGESIZE != PAGE or not self._size:  # elsewhere a huge page is not 2 MiB, but up to 512
            return
        address = _libc.mmap(None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address in (None, _MAP_FAILED):
            return
        self._address = address
        # RANDOM: the page that was asked for, not the one behind it too.
        if any(_libc.madvise(address, self._size, advice) for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_RANDOM)):
            self.close()

    def fill(self, low: int, high: int) -> None:
        """The huge pages that hold bytes ``low`` to ``high``, if that is more than one; a failure shows on reading."""
        first, last = low - low % HUGE_PAGE, min(high + -high % HUGE_PAGE, self._size)
        if self._address is None or high - low < HUGE_PAGE or last <= first:
            return
        _libc.madvise(self._address + first, last - first, _POPULATE_READ)
        _libc.madvise(self._address + first, last - first, mmap.MADV_DONTNEED)  # out of this process, not of the cache

    def close(self) -> None:
        if self._address is not None:
            _libc.munmap(self._address, self._size)
            self._address = None


def is_cached(descriptor: int, first: int, last: int) -> bool:
    """Whether the page cache holds all of these whole pages; False too where the kernel cannot tell."""
    asked = (ctypes.c_uint64 * 2)(first, last - first)
    told = (ctypes.c_uint64 * 5)()  # cached, dirty, being written, evicted, recently evicted: pages
    failed = _libc.syscall(
        ctypes.c_long(_CACHESTAT), ctypes.c_int(descriptor), ctypes.byref(asked), ctypes.byref(told), ctypes.c_uint(0)
    )  # fmt: skip
    return failed == 0 and told[0] >= (last - first) // PAGE
