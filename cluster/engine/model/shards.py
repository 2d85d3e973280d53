"""Which part of a tensor in a file one parameter holds, or a part of one."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.checkpoint.splits import Pieces


@dataclass(frozen=True, slots=True)
class Shard:
    """What is kept of a stored tensor, seen as a matrix ``[prod(shape[:-1]), shape[-1]]``; a vector is a column.

    ``rows`` and ``columns`` are ranges ``(start, stop)``, kept in order; None: all of them.
    """

    rows: Pieces | None = None
    columns: Pieces | None = None


WHOLE = Shard()
