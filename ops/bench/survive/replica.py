"""One replica without a model, as a process that can be made slow, made to break, and killed.

    python -m ops.bench.survive.replica --slot 0 --generation 1 --slots 16 --step-ms 30

It speaks the real Engine session (ops/bench/overload/replicas.py) on a loopback port, which comes as a JSON line.
A line "step_ms 300" on its standard input changes its pace, "breaks 1" ends its session with every step from then on;
the end of the input ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys

import uvloop

from ops.bench.overload.replicas import Replica


async def serve(arguments: argparse.Namespace) -> None:
    replica = Replica(arguments.slot, arguments.slots, arguments.step_ms / 1e3, arguments.generation)
    endpoint = await replica.start()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print(json.dumps({"pid": os.getpid(), "address": endpoint.address}), flush=True)
    while line := await lines.readline():
        word, value = line.decode().split()
        if word == "step_ms":
            replica.step_s = float(value) / 1e3
        elif word == "breaks":
            replica.breaks = bool(int(value))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--generation", type=int, default=1)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=30.0)
    uvloop.run(serve(parser.parse_args()))
