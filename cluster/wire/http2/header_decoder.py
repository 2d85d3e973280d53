"""HPACK's decoder, which knows a header block again."""

from __future__ import annotations

from collections.abc import Iterable

from hpack import Decoder, HeaderTuple

KEPT_BLOCKS = 16
KEPT_BYTES = 24  # of a block: one byte a field
_FIELD, _LONG_FIELD = 0x80, 0xFF  # a byte that is a field of a table, and one whose number goes on behind it


class KeepingDecoder(Decoder):
    """A caller's blocks are mostly numbers of fields that both sides know from earlier ones, the same for every call.

    What such a block says changes with the table only, so it is kept until that changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[bytes, tuple[HeaderTuple, ...]] = {}
        self._state: tuple[int, tuple[bytes, bytes] | None] = (0, None)

    def decode(self, data: bytes, raw: bool = False) -> Iterable[HeaderTuple]:  # noqa: FBT001, FBT002 - hpack's
        known = self._kept.get(data) if raw else None
        if known is not None:
            return known
        decoded = tuple(super().decode(data, raw))
        entries = self.header_table.dynamic_entries
        # Fields come in at the left and leave at the right.
        state = len(entries), entries[0] if entries else None
        if state[0] != self._state[0] or state[1] is not self._state[1]:
            self._kept.clear()
            self._state = state
        if raw and len(data) <= KEPT_BYTES and len(self._kept) < KEPT_BLOCKS and all(map(_is_known, data)):
            self._kept[bytes(data)] = decoded
        return decoded


def _is_known(byte: int) -> bool:
    return _FIELD < byte < _LONG_FIELD
