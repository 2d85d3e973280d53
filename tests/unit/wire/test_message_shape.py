"""What a serialized message holds, counted without decoding it: against protobuf's own decoder."""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import suppress

import pytest
from google.protobuf import struct_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message

from cluster.v1 import inference_pb2
from cluster.wire.message_shape import Bounds, MessageShape
from tests.contract.fuzzing import SAMPLES, mutate, part, spoil, varint

PLENTY = Bounds(fields=10**6, numbers=10**6, unknown_bytes=10**6)
TIGHT = Bounds(fields=12, numbers=6, unknown_bytes=8)
GENERATE = inference_pb2.GenerateRequest.DESCRIPTOR
SPOILED = 20_000


def excess(raw: bytes, *, fields: int = 10**6, numbers: int = 10**6, unknown_bytes: int = 10**6) -> str | None:
    return MessageShape(GENERATE, Bounds(fields, numbers, unknown_bytes)).excess(raw)


def counted(message: Message) -> tuple[int, int]:
    """Fields and packed numbers of what ``message`` is serialized to."""
    fields = numbers = 0
    for field, value in message.ListFields():
        if field.message_type is None:
            if field.is_repeated and field.type != field.TYPE_STRING:
                fields, numbers = fields + 1, numbers + len(value)
            else:
                fields += len(value) if field.is_repeated else 1
        elif field.message_type.GetOptions().map_entry:
            fields += 3 * len(value)
        else:
            for each in value if field.is_repeated else [value]:
                inside = counted(each)
                fields, numbers = fields + 1 + inside[0], numbers + inside[1]
    return fields, numbers


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_bounds_are_the_most_that_is_taken(sample: Message) -> None:
    raw = sample.SerializeToString()
    fields, numbers = counted(sample)
    descriptor = sample.DESCRIPTOR
    assert MessageShape(descriptor, Bounds(fields, numbers, 0)).excess(raw) is None
    if fields:
        refusal = MessageShape(descriptor, Bounds(fields - 1, numbers, 0)).excess(raw)
        assert refusal is not None
        assert f"more than {fields - 1} fields" in refusal
    if numbers:
        refusal = MessageShape(descriptor, Bounds(fields, numbers - 1, 0)).excess(raw)
        assert refusal is not None
        assert f"more than {numbers - 1} numbers" in refusal


def test_sentences_name_what_is_too_much_and_the_limit() -> None:
    assert excess(part(5, b"\x0a\x00" * 20), fields=9) == (
        "The GenerateRequest has more than 9 fields such as Chat.messages in all its parts, which is the limit; "
        "send less at once, and numbers packed."
    )
    assert excess(part(4, part(1, bytes(20))), numbers=9) == (
        "The GenerateRequest has more than 9 numbers such as TokenIds.ids, which is the limit; send less at once."
    )
    assert excess(part(900, bytes(20)), unknown_bytes=9) == (
        "The GenerateRequest has more than 9 bytes of fields that its proto does not have, which is the limit; "
        "send less at once."
    )
    unknown = excess(b"\xf8\x7f\x01" * 20, fields=9)
    assert unknown is not None
    assert "more than 9 fields in all its parts" in unknown


def test_numbers_are_counted_rather_than_their_bytes() -> None:
    ids = [1, 300, 70_000, 2**32 - 1] * 100  # 1, 2, 3 and 5 bytes
    raw = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=ids), generated_token_ids=ids
    ).SerializeToString()
    assert excess(raw, numbers=800) is None
    assert excess(raw, numbers=799) is not None
    split = b"".join(part(4, part(1, varint(number))) for number in ids)  # parts of one message, merged when decoded
    assert len(inference_pb2.GenerateRequest.FromString(split).token_ids.ids) == 400
    assert excess(split, numbers=400) is None
    assert excess(split, numbers=399) is not None
    longer = part(4, part(1, b"\x80" * 9 + b"\x00"))  # a zero may take ten bytes
    assert excess(longer * 400, numbers=400) is None
    assert excess(longer * 401, numbers=400) is not None


def test_numbers_of_a_long_prompt_are_counted_in_pieces() -> None:
    ids = [70_000] * 300_001
    raw = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids)).SerializeToString()
    assert excess(raw, numbers=300_001) is None
    assert excess(raw, numbers=300_000) is not None


def test_numbers_that_are_not_packed_are_fields() -> None:
    raw = b"\x38\x01" * 50
    assert len(inference_pb2.GenerateRequest.FromString(raw).generated_token_ids) == 50
    assert excess(raw, numbers=0, fields=50) is None
    assert excess(raw, numbers=0, fields=49) is not None


def test_what_comes_again_and_again_is_counted_each_time() -> None:
    """A decoder keeps one of them, and makes all."""
    assert excess(part(6, b"") * 50, fields=49) is not None
    assert excess(part(3, b"x") * 50, fields=49) is not None
    other_side = part(5, part(1, b"") * 20) + part(4, part(1, b"\x01"))
    assert inference_pb2.GenerateRequest.FromString(other_side).WhichOneof("prompt") == "token_ids"
    assert excess(other_side, fields=22) is not None


@pytest.mark.parametrize(
    ("raw", "unknown"),
    [
        (part(900, bytes(7)), 10),
        (b"\xf8\x7f\x05", 3),  # a varint
        (b"\xf8\x7f" + b"\x80" * 9 + b"\x00", 12),
        (b"\xfd\x7f" + bytes(4), 6),
        (b"\xf9\x7f" + bytes(8), 10),
        (part(5, part(1, part(700, b"abc"))), 6),  # in a part of a part
        (b"\x1d" + bytes(4), 5),  # text is no number
        (b"\x18\x01", 2),
        (b"\xfb\x7f\x0a\x01x\xfc\x7f", 7),  # a group: nothing in it is known
        (b"\xfb\x7f\x0b\x08\x01\x0c\xfc\x7f", 8),
        (b"\xfb\x7f\xfc\x7f" + part(900, bytes(7)), 14),
    ],
)
def test_unknown_fields_are_counted_by_their_bytes(raw: bytes, unknown: int) -> None:
    inference_pb2.GenerateRequest.FromString(raw)
    assert excess(raw, unknown_bytes=unknown) is None
    assert excess(raw, unknown_bytes=unknown - 1) is not None


def test_a_message_goes_on_behind_a_group() -> None:
    raw = part(5, b"\x13\x0a\x00\x14" + part(1, b"") * 20)
    assert len(inference_pb2.GenerateRequest.FromString(raw).chat.messages) == 20
    assert excess(raw, fields=24) is None
    assert excess(raw, fields=23) is not None


def test_tags_may_be_longer_than_they_need_to_be() -> None:
    raw = b"\xaa\x00\x28" + b"\x8a\x80\x00\x00" * 10
    assert len(inference_pb2.GenerateRequest.FromString(raw).chat.messages) == 10
    assert excess(raw, fields=11, unknown_bytes=0) is None
    assert excess(raw, fields=10) is not None


def test_it_looks_no_further_than_a_bound() -> None:
    broken = b"\xff" * 20
    assert excess(b"\x38\x01" * 50 + broken, fields=49) is not None
    assert excess(part(7, bytes(50)) + broken, numbers=49) is not None
    assert excess(part(900, bytes(50)) + broken, unknown_bytes=49) is not None
    assert excess(b"\x38\x01" * 50 + broken) is None


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_what_ends_too_early_is_left_to_the_decoder(sample: Message) -> None:
    raw = sample.SerializeToString()
    for end in range(len(raw)):
        assert MessageShape(sample.DESCRIPTOR, PLENTY).excess(raw[:end]) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"\x0c",  # the end of no group
        b"\x2a\x03\x0c\x0a\x00",
        b"\x2a\x01\x0b",  # a group without an end
        b"\x2a\x03\x0b\x0a\x00",
        b"\x2a\x01\x0b\x0c",  # whose end is not where it should be
        b"\x0e",
        b"\x0f",
        b"\xff" * 11,
        b"\x38" + b"\x80" * 10 + b"\x00",
        b"\x2a\x03\x0a\x05ab" + bytes(9),  # longer than what it is in
        b"\x2a\x02\x15\x00" + bytes(9),
        b"\x2a\x02\x11\x00" + bytes(9),
        b"\x2a\x02\x08\x80\x00" + bytes(9),
        b"\x22\xff\xff\xff\xff\x0f",
    ],
)
def test_what_is_no_message_is_left_to_the_decoder(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        inference_pb2.GenerateRequest.FromString(raw)
    assert excess(raw) is None
    assert excess(raw + b"\x38\x01" * 50, fields=30) is None, "nothing behind it counts"


def spoiled(seed: int) -> tuple[type[Message], bytes]:
    rng = random.Random(seed)
    sample = rng.choice(SAMPLES)
    message = type(sample)()
    message.CopyFrom(sample)
    if rng.random() < 0.3:
        mutate(message, rng)
    raw = message.SerializeToString()
    for _ in range(rng.choice((0, 1, 1, 2))):
        raw = spoil(raw, rng)
    if rng.random() < 0.2:
        raw += part(rng.choice((4, 5, 6, 14)), raw[: rng.randrange(len(raw) + 1)])
    return type(sample), raw


def within(message: Message, bounds: Bounds) -> bool:
    """Whether what was decoded is no more than ``bounds`` let through."""
    whole = message.ByteSize()
    message.DiscardUnknownFields()
    fields, numbers = counted(message)
    packed = sum(1 for _ in lists_of_numbers(message))  # each may have come unpacked, and is a field then
    return (
        numbers <= bounds.numbers + bounds.fields
        and fields - packed <= bounds.fields
        and whole - message.ByteSize() <= bounds.unknown_bytes + 4  # lengths of parts get shorter
    )


def lists_of_numbers(message: Message) -> Iterable[object]:
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for each in value if field.is_repeated else [value]:
                yield from lists_of_numbers(each)
        elif field.is_repeated and field.type != field.TYPE_STRING:
            yield value


def test_nothing_that_a_decoder_takes_slips_through() -> None:
    shapes = {type(sample): MessageShape(sample.DESCRIPTOR, TIGHT) for sample in SAMPLES}
    passed = refused = 0
    for seed in range(SPOILED):
        kind, raw = spoiled(seed)
        with suppress(DecodeError):
            message = kind.FromString(raw)
            if shapes[kind].excess(raw) is None:
                assert within(message, TIGHT), f"spoiled({seed})"
                passed += 1
            else:
                refused += 1
    assert passed > SPOILED / 10
    assert refused > SPOILED / 10


def test_messages_may_hold_themselves() -> None:
    shape = MessageShape(struct_pb2.Value.DESCRIPTOR, Bounds(fields=30, numbers=0, unknown_bytes=0))
    value = struct_pb2.Value(string_value="x")
    for _ in range(10):
        value = struct_pb2.Value(list_value=struct_pb2.ListValue(values=[value]))
    assert shape.excess(value.SerializeToString()) is None
    for _ in range(10):
        value = struct_pb2.Value(list_value=struct_pb2.ListValue(values=[value]))
    assert shape.excess(value.SerializeToString()) is not None


@pytest.mark.parametrize(("kind", "width"), [("FIXED32", 4), ("FLOAT", 4), ("SFIXED64", 8), ("DOUBLE", 8), ("BOOL", 1)])
def test_numbers_of_other_types(kind: str, width: int) -> None:
    file = FileDescriptorProto(name="numbers.proto", package="numbers", syntax="proto3")
    file.message_type.add(name="Numbers").field.add(
        name="each", number=1, type=FieldDescriptorProto.Type.Value(f"TYPE_{kind}"),
        label=FieldDescriptorProto.LABEL_REPEATED,
    )  # fmt: skip
    pool = DescriptorPool()
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName("numbers.Numbers")
    raw = part(1, bytes(10 * width))
    assert MessageShape(descriptor, Bounds(1, 10, 0)).excess(raw) is None
    assert MessageShape(descriptor, Bounds(1, 9, 0)).excess(raw) is not None
    alone = {4: b"\x0d", 8: b"\x09", 1: b"\x08"}[width] + bytes(width)
    assert MessageShape(descriptor, Bounds(1, 0, 0)).excess(alone) is None
