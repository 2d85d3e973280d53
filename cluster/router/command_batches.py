"""What was gathered for an engine, as messages of a bounded size. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.v1 import engine_pb2

COMMANDS_BYTES_MAX = 8 * 2**20  # of one message, far below what a channel carries


def batches(
    submits: Iterable[engine_pb2.Submit], cancels: Iterable[int], bytes_max: int = COMMANDS_BYTES_MAX
) -> Iterator[engine_pb2.Commands]:
    """All of them in order, in as few messages as have at most ``bytes_max`` of submits each.

    A single submit may be larger than that. ``cancels`` leave first: they free what the submits need.
    """
    commands = engine_pb2.Commands(cancels=[engine_pb2.Cancel(sequence_id=i) for i in cancels])
    size = 0
    for submit in submits:
        submit_bytes = submit.ByteSize()
        if commands.submits and size + submit_bytes > bytes_max:
            yield commands
            commands, size = engine_pb2.Commands(), 0
        commands.submits.append(submit)
        size += submit_bytes
    if commands.submits or commands.cancels:
        yield commands
