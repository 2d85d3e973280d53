"""What was gathered for an engine, as messages of a bounded size. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cluster.v1 import engine_pb2

COMMANDS_BYTES_MAX = 8 * 2**20  # of one message, far below what a channel carries


def batches(
    submits: Sequence[engine_pb2.Submit], cancels: Iterable[int], bytes_max: int = COMMANDS_BYTES_MAX
) -> Iterator[engine_pb2.SessionRequest]:
    """All of them in order, in as few messages as have at most ``bytes_max`` of submits each.

    A single submit may be larger than that. ``cancels`` leave first: they free what the submits need.
    """
    request = engine_pb2.SessionRequest()
    commands = request.commands  # filled in place: a message that is put into another one is copied
    for sequence_id in cancels:
        commands.cancels.add(sequence_id=sequence_id)
    size, alone = 0, len(submits) == 1
    for submit in submits:
        submit_bytes = 0 if alone else submit.ByteSize()
        if commands.submits and size + submit_bytes > bytes_max:
            yield request
            request = engine_pb2.SessionRequest()
            commands, size = request.commands, 0
        commands.submits.append(submit)
        size += submit_bytes
    if commands.submits or commands.cancels:
        yield request
