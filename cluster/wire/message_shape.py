"""How much a serialized message holds, found out before it is decoded. Pure.

A decoder makes an object of each part: two bytes of an empty message become thirty, or more, and 64 MiB of them take
gigabytes and a second. The format: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_VARINT, _FIXED64, _LENGTH, _GROUP, _GROUP_END, _FIXED32 = range(6)  # wire types: the lowest three bits of a tag
_VARINT_BYTES_MAX = 10
_CONTINUED = bytes(range(128, 256))  # the bytes of a varint but its last
_COUNTED_TOGETHER = 2**18  # bytes of numbers
_F = FieldDescriptor
_FIXED_WIRE_TYPES = {
    _F.TYPE_DOUBLE: _FIXED64, _F.TYPE_FIXED64: _FIXED64, _F.TYPE_SFIXED64: _FIXED64,
    _F.TYPE_FLOAT: _FIXED32, _F.TYPE_FIXED32: _FIXED32, _F.TYPE_SFIXED32: _FIXED32,
}  # fmt: skip
_WIDTHS = {_VARINT: 1, _FIXED32: 4, _FIXED64: 8}  # the least bytes of a number


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one message may hold, its parts on all levels together.

    ``fields``: as often as there are some, numbers that are not packed included. ``numbers``: packed ones.
    ``unknown_bytes``: of fields that the message is not known to have, which decoding keeps.
    """

    fields: int
    numbers: int
    unknown_bytes: int


@dataclass(frozen=True, slots=True)
class _Field:
    """``parts``: of a message, by their tags. ``width``: bytes of a packed number, 1 for varints; 0 for all else."""

    name: str
    parts: _Parts | None = None
    width: int = 0


_Parts: TypeAlias = dict[int, _Field]
_GROUP_PARTS: _Parts = {}  # messages of proto3 have no groups: nothing in one is known


class _Malformed(Exception):  # noqa: N818 - the decoder's to refuse
    pass


class MessageShape:
    """Looks at serialized messages of one type. The time it takes is bounded: it stops where a bound is passed."""

    def __init__(self, message: Descriptor, bounds: Bounds) -> None:
        self._name, self._bounds = message.name, bounds
        self._parts = _parts(message, {})

    def excess(self, raw: bytes) -> str | None:
        """A sentence for whoever sent ``raw``, where it holds too much.

        None where it does not, or where no decoder can take it: all that comes before what is wrong has been counted.
        """
        try:
            return self._excess(_Walk(raw, self._parts))
        except (_Malformed, IndexError):
            return None

    def _excess(self, walk: _Walk) -> str | None:
        bounds, field = self._bounds, None
        for _ in range(bounds.fields + 1):
            if walk.ended():
                return None
            field = walk.step()
            if walk.unknown_bytes > bounds.unknown_bytes:
                return self._too_much(f"{bounds.unknown_bytes} bytes of fields that its proto does not have")
            if walk.numbers > bounds.numbers and walk.counted(bounds.numbers) > bounds.numbers:
                assert field is not None, "whose numbers are counted"
                return self._too_much(f"{bounds.numbers} numbers such as {field.name}")
        such = f" such as {field.name}" if field is not None else ""
        return self._too_much(f"{bounds.fields} fields{such} in all its parts", "send less at once, and numbers packed")

    def _too_much(self, what: str, advice: str = "send less at once") -> str:
        return f"The {self._name} has more than {what}, which is the limit; {advice}."


class _Walk:
    """From field to field of a serialized message, down into its parts; _Malformed or IndexError where there is none.

    ``numbers``: packed ones passed so far, at most: most messages need no counting.
    """

    __slots__ = ("_above", "_end", "_parts", "_pos", "_raw", "_uncounted", "numbers", "unknown_bytes")

    def __init__(self, raw: bytes, parts: _Parts) -> None:
        self._raw, self._pos, self._end, self._parts = raw, 0, len(raw), parts
        self._above: list[tuple[int, _Parts]] = []  # where the messages around this part end, and what they may hold
        self._uncounted: list[tuple[int, int]] = []  # varints: the first byte, and one behind the last
        self.numbers = self.unknown_bytes = 0

    def ended(self) -> bool:
        while self._pos == self._end:
            if not self._above or self._parts is _GROUP_PARTS:  # a group has an end of its own
                return True
            self._end, self._parts = self._above.pop()
        return False

    def step(self) -> _Field | None:
        """Behind the next field, or into it if it is a message; None for an unknown one."""
        raw, begin = self._raw, self._pos
        tag, pos = raw[begin], begin + 1
        if tag > 127:
            tag, pos = _varint(raw, begin)
        field = self._parts.get(tag)
        if tag & 7 == _LENGTH:
            length = raw[pos]
            pos += 1
            if length > 127:
                length, pos = _varint(raw, pos - 1)
            self._pos = pos + length
            if self._pos > self._end:
                raise _Malformed
            if field is not None and field.parts is not None:
                self._above.append((self._end, self._parts))
                self._pos, self._end, self._parts = pos, self._pos, field.parts
            elif field is not None and field.width:
                self._numbers(pos, length, field.width)
        else:
            self._pos = self._behind(tag & 7, pos)
            if self._pos > self._end:
                raise _Malformed
        if field is None:
            self.unknown_bytes += self._pos - begin
        return field

    def counted(self, most: int) -> int:
        """``numbers``, but exactly; more than ``most`` where there are more."""
        self.numbers -= sum(end - begin for begin, end in self._uncounted)
        for begin, end in self._uncounted:
            for start in range(begin, end, _COUNTED_TOGETHER):
                piece = self._raw[start : min(start + _COUNTED_TOGETHER, end)]
                self.numbers += len(piece.translate(None, _CONTINUED))
                if self.numbers > most:
                    return self.numbers
        self._uncounted = []
        return self.numbers

    def _numbers(self, begin: int, length: int, width: int) -> None:
        self.numbers += length // width
        if width == 1:
            self._uncounted.append((begin, begin + length))

    def _behind(self, wire_type: int, pos: int) -> int:
        """Where what ``pos`` is the first byte of ends; of a group, where its fields begin."""
        if wire_type == _VARINT:
            return pos + 1 if self._raw[pos] < 128 else _varint(self._raw, pos)[1]
        if wire_type == _FIXED32:
            return pos + 4
        if wire_type == _FIXED64:
            return pos + 8
        if wire_type == _GROUP:
            self._above.append((self._end, self._parts))
            self._parts = _GROUP_PARTS
        elif wire_type == _GROUP_END and self._parts is _GROUP_PARTS:
            self._end, self._parts = self._above.pop()
        else:
            raise _Malformed
        return pos


def _parts(message: Descriptor, known: dict[str, _Parts], entry_of: str = "") -> _Parts:
    """The fields of ``message`` by their tags. ``known``: of messages by their names, since they may hold themselves.

    ``entry_of``: the map that ``message`` is an entry of, which nobody knows by another name.
    """
    if message.full_name in known:
        return known[message.full_name]
    parts = known[message.full_name] = {}
    for field in message.fields:
        name, number = entry_of or f"{message.name}.{field.name}", field.number << 3
        if field.message_type is not None:
            is_map = field.message_type.GetOptions().map_entry
            parts[number | _LENGTH] = _Field(name, _parts(field.message_type, known, name if is_map else ""))
        elif field.type in (_F.TYPE_STRING, _F.TYPE_BYTES):
            parts[number | _LENGTH] = _Field(name)
        else:
            wire_type = _FIXED_WIRE_TYPES.get(field.type, _VARINT)
            parts[number | wire_type] = _Field(name)
            if field.is_repeated:  # comes in both ways, whatever is declared
                parts[number | _LENGTH] = _Field(name, width=_WIDTHS[wire_type])
    return parts


def _varint(raw: bytes, pos: int) -> tuple[int, int]:
    """The varint at ``pos``, and where it ends; _Malformed or IndexError."""
    value = 0
    for shift in range(0, 7 * _VARINT_BYTES_MAX, 7):
        byte = raw[pos]
        pos += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, pos
    raise _Malformed
