"""Holds memory that the machine has behind it, and lets go of it as fast as others take some.

A virtual machine may give memory that is free for a second or two back to its host, and asks for every page anew later:
a second or two of CPU time for each gigabyte, whoever comes first. ``python keeper.py BYTES`` writes that many bytes,
says "held", and after one line on its standard input keeps the machine's free memory at what it was, plus ``AHEAD``, by
releasing piece after piece, until nothing is left. So whoever allocates meanwhile gets pages that the host has given
already.
"""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

PIECE, AHEAD = 32 * 2**20, 768 * 2**20
INTERVAL_S = 0.003


def free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no MemFree")


def main() -> None:
    pieces = []
    for _ in range(int(sys.argv[1]) // PIECE):
        piece = mmap.mmap(-1, PIECE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        piece.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, PIECE, 4096):
            piece[offset] = 1
        pieces.append(piece)
    print("held", flush=True)
    sys.stdin.readline()
    wanted = free_bytes() + AHEAD
    while pieces:
        for _ in range(max(0, wanted - free_bytes()) // PIECE):
            if pieces:
                pieces.pop().close()
        time.sleep(INTERVAL_S)


if __name__ == "__main__":
    main()
