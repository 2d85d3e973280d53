"""Wrong input for a router, by structure: protobuf messages mutated field by field, and HTTP/2 frames.

Everything is a function of a seed: ``message_case(seed)`` and ``connection_case(seed)`` make the same case again.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from cluster.v1 import inference_pb2

# ---- protobuf ----

F = FieldDescriptor
INTEGERS = {
    F.TYPE_UINT32: (0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32 - 1),
    F.TYPE_UINT64: (0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
    F.TYPE_INT32: (0, 1, -1, 100, -100, 2**31 - 1, -(2**31)),
}
LARGE = 1000  # what is not repeated by the thousand: making and encoding it would take all the time
FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 2.0, 100.0, 1e-45, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", "x", "demo", "other", "user", "\x00", "\n\r\t", "é" * 40, "👩‍💻" * 20, "\u202e\ufeff\u2028", "\U0001d518" * 300, "%s%n{}{{x}}",
    "<|endoftext|></s>", "a" * 300, "b" * 20_000,
)  # fmt: skip
SAMPLES = (
    inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]), return_token_ids=True),
    inference_pb2.GenerateRequest(
        text="the fox", sampling=inference_pb2.Sampling(max_tokens=3, temperature=0.5, seed=4, stop=["x"]), logprobs=2
    ),
    inference_pb2.GenerateRequest(
        chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hello")]),
        sampling=inference_pb2.Sampling(max_tokens=2, logit_bias={4: 1.0}, stop_token_ids=[9], min_tokens=1),
        priority=3,
        model="demo",
        cache_salt="salt",
    ),
    inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=range(20)), generated_token_ids=[3, 4], received_characters=2,
        sampling=inference_pb2.Sampling(max_tokens=4, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1),
    ),
    inference_pb2.TokenizeRequest(text="the fox", add_special_tokens=True),
    inference_pb2.TokenizeRequest(chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="r", content="c")])),
    inference_pb2.ListModelsRequest(),
)  # fmt: skip
METHODS: dict[type[Message], tuple[str, ...]] = {
    inference_pb2.GenerateRequest: ("Generate", "Complete", "Generate", "Complete", "ExplainRoute"),
    inference_pb2.TokenizeRequest: ("Tokenize",),
    inference_pb2.ListModelsRequest: ("ListModels",),
}


@dataclass(frozen=True)
class MessageCase:
    """``raw`` goes to ``method``, which may not be able to decode it, with ``metadata``."""

    method: str
    raw: bytes
    metadata: tuple[tuple[str, str], ...]


def message_case(seed: int) -> MessageCase:
    rng = random.Random(seed)
    sample = rng.choice(SAMPLES)
    message = type(sample)()
    message.CopyFrom(sample)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        mutate(message, rng)
    raw = message.SerializeToString()
    if rng.random() < 0.25:
        raw = spoil(raw, rng)
    metadata: tuple[tuple[str, str], ...] = ()
    if rng.random() < 0.1:
        metadata = ((rng.choice(("x-tenant", "x-session-id", "x-request-id")), rng.choice(TEXTS)),)
    return MessageCase(rng.choice(METHODS[type(sample)]), raw, metadata)


@cache
def _fields(descriptor: Descriptor) -> tuple[FieldDescriptor, ...]:
    return tuple(descriptor.fields)


def mutate(message: Message, rng: random.Random) -> None:
    """One field of ``message``, or of a message in it, gets another value, goes, or is repeated often."""
    fields = _fields(message.DESCRIPTOR)
    if not fields:
        return
    field = rng.choice(fields)
    if rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        entries = getattr(message, field.name)
        for _ in range(rng.choice((1, 1, 3))):
            entries[_value(field.message_type.fields_by_name["key"], rng)] = rng.choice(FLOATS)
        if rng.random() < 0.05:
            entries.update(dict.fromkeys(range(2000), rng.choice(FLOATS)))
    elif field.message_type is not None:
        nested = getattr(message, field.name)
        if field.is_repeated:
            for _ in range(rng.choice((1, 1, 5))):
                mutate(nested.add(), rng)
            if rng.random() < 0.1:
                nested.extend([nested[-1]] * (300 if nested[-1].ByteSize() < LARGE else 3))
        else:
            nested.SetInParent()
            mutate(nested, rng)
    elif field.is_repeated:
        value, count = _value(field, rng), rng.choice((1, 1, 3, 20, 2000))
        if isinstance(value, str) and len(value) > LARGE:
            count = min(count, 20)
        getattr(message, field.name).extend([value] * count)
    else:
        setattr(message, field.name, _value(field, rng))


def _value(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.type in INTEGERS:
        return rng.choice(INTEGERS[field.type])
    if field.type == F.TYPE_FLOAT:
        return rng.choice(FLOATS)
    if field.type == F.TYPE_BOOL:
        return rng.random() < 0.5
    assert field.type == F.TYPE_STRING, field.type
    return rng.choice(TEXTS)


def varint(value: int) -> bytes:
    """As the wire format has it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def part(number: int, content: bytes) -> bytes:
    """The field ``number`` with ``content``, and its length before it."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def spoil(raw: bytes, rng: random.Random) -> bytes:
    """What no message of ours would be: unknown fields, both sides of a oneof, wrong types, cuts, invalid UTF-8."""
    kind = rng.randrange(7)
    if kind == 0:  # an unknown field
        return raw + varint(rng.choice((100, 2**20, 2**28)) << 3) + varint(rng.getrandbits(60))
    if kind == 1:  # a oneof with all its sides, the last one counts
        return raw + b"\x1a\x01x" + b"\x22\x03\x0a\x01\x05" + b"\x2a\x00"
    if kind == 2:  # a known field with another wire type
        return raw + varint(rng.randrange(1, 15) << 3 | rng.choice((0, 1, 5))) + rng.randbytes(8)
    if kind == 3 and raw:
        return raw[: rng.randrange(len(raw))]
    if kind == 4 and raw:  # some bits
        spoiled = bytearray(raw)
        for _ in range(rng.choice((1, 1, 3, 10))):
            spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        return bytes(spoiled)
    if kind == 5:  # invalid UTF-8 where text should be, and groups within groups
        return raw + rng.choice(
            (b"\x1a\x02\xff\xfe", b"\x12\x03\xed\xa0\x80", b"\x0a\x01\xc0", b"\x0b" * 150, b"\x0b\x0c")
        )
    return rng.randbytes(rng.choice((1, 3, 50, 3000)))


# ---- HTTP/2 ----

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED, PRIORITISED = 0x1, 0x4, 0x8, 0x20


def frame(kind: int, flags: int, stream: int, payload: bytes, *, length: int | None = None) -> bytes:
    """``length``: what the header claims, unless that is true."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _header(name: bytes, value: bytes) -> bytes:
    """Literal, never indexed, without Huffman (RFC 7541, 6.2.3)."""
    return b"\x10" + _integer(len(name), 7) + name + _integer(len(value), 7) + value


def _integer(value: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    return bytes((value,)) if value < most else bytes((most,)) + varint(value - most)


def call_headers(path: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    given = (
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"), (b"te", b"trailers"),
        (b"content-type", b"application/grpc"), *extra,
    )  # fmt: skip
    return b"".join(_header(name, value) for name, value in given)


def grpc_message(raw: bytes) -> bytes:
    return b"\x00" + struct.pack(">I", len(raw)) + raw


def path_of(method: str) -> bytes:
    service = "Routing" if method == "ExplainRoute" else "Inference"
    return f"/cluster.v1.{service}/{method}".encode()


def _path(rng: random.Random) -> bytes:
    known = [path_of(method) for methods in METHODS.values() for method in methods]
    return rng.choice((*known, *known, b"/cluster.v1.Inference/Nothing", b"/", b"*", b"/grpc.health.v1.Health/Check"))


EXTRA: tuple[tuple[bytes, bytes], ...] = (
    (b"grpc-timeout", b"1n"), (b"grpc-timeout", b"99999999999999H"), (b"grpc-timeout", b"-1S"), (b"grpc-timeout", b""),
    (b"grpc-timeout", b"50m"), (b"grpc-encoding", b"gzip"), (b"grpc-encoding", b"nonsense"), (b"x-tenant", b"t\xff"),
    (b"x-tenant", b"t" * 500), (b"grpc-tags-bin", b"!!!"), (b"X-Upper", b"1"), (b"", b"empty"), (b":status", b"200"),
    (b"te", b"gzip"), (b"connection", b"close"), (b"x-long", b"l" * 9000), (b"x-huge", b"h" * 15_000),
    (b"content-length", b"3"), (b"user-agent", b"\r\n"),
)  # fmt: skip


class _Streams:
    """Stream ids as a client would take them, mostly."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.last = rng, -1

    def new(self) -> int:
        self.last += 2
        return self.last

    def some(self) -> int:
        return self.rng.choice((0, 1, 2, max(self.last, 1), self.last + 2, 2**31 - 1))


def _whole_call(streams: _Streams, rng: random.Random) -> bytes:
    """Headers and a message, as they should be but for what is in the message; sometimes without an end."""
    stream, case = streams.new(), message_case(rng.getrandbits(32))
    extra = (rng.choice(EXTRA),) if rng.random() < 0.2 else ()
    head = frame(HEADERS, END_HEADERS, stream, call_headers(path_of(case.method), *extra))
    body = grpc_message(case.raw)[:16_384]
    return head + frame(DATA, rng.choice((END_STREAM, END_STREAM, END_STREAM, 0)), stream, body)


def _left_call(streams: _Streams, rng: random.Random) -> bytes:
    """A call that runs, and is reset or left half."""
    stream = streams.new()
    raw = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5, 6])).SerializeToString()
    head = frame(HEADERS, END_HEADERS, stream, call_headers(b"/cluster.v1.Inference/Generate"))
    body = frame(DATA, rng.choice((0, END_STREAM)), stream, grpc_message(raw))
    reset = frame(RST_STREAM, 0, stream, struct.pack(">I", rng.choice((0, 2, 7, 8, 2**32 - 1))))
    return head + rng.choice((body + reset, reset, body, b"", frame(DATA, END_STREAM, stream, b"")))


def _odd_headers(streams: _Streams, rng: random.Random) -> bytes:
    stream, kind = streams.new(), rng.randrange(6)
    if kind == 0:
        return frame(HEADERS, END_HEADERS | END_STREAM, stream, call_headers(_path(rng), rng.choice(EXTRA)))
    if kind == 1:  # split, with something between
        block = call_headers(_path(rng), rng.choice(EXTRA))
        between = rng.choice((b"", b"", frame(PING, 0, 0, b"12345678")))
        return frame(HEADERS, 0, stream, block[:20]) + between + frame(CONTINUATION, END_HEADERS, stream, block[20:])
    if kind == 2:
        return frame(HEADERS, END_HEADERS, stream, rng.randbytes(rng.choice((1, 10, 200))))
    if kind == 3:
        block = b"\x05" + call_headers(_path(rng)) + bytes(5)
        return frame(HEADERS, END_HEADERS | PADDED | PRIORITISED, stream, block)
    if kind == 4:
        return frame(HEADERS, END_HEADERS, stream, b"".join(_header(b"x-%d" % i, b"v" * 90) for i in range(150)))
    return frame(HEADERS, END_HEADERS, stream, call_headers(_path(rng))[rng.randrange(60) :])


def _control(streams: _Streams, rng: random.Random) -> bytes:
    word = struct.pack(">I", rng.choice((0, 1, 65_535, 2**31 - 1, 2**32 - 1)))
    kind = rng.randrange(7)
    if kind == 0:
        return frame(WINDOW_UPDATE, 0, streams.some(), word)
    if kind == 1:
        setting = struct.pack(">H", rng.choice((1, 2, 3, 4, 5, 6, 0xFE03, 99)))
        return frame(
            SETTINGS, rng.choice((0, 0, 1)), rng.choice((0, 0, 0, 1)), (setting + word) * rng.choice((1, 1, 40))
        )
    if kind == 2:
        return frame(PING, rng.choice((0, 1)), 0, rng.randbytes(rng.choice((8, 8, 3)))) * rng.choice((1, 1, 20))
    if kind == 3:
        return frame(RST_STREAM, 0, streams.some(), word)
    if kind == 4:
        return frame(PRIORITY, 0, streams.some(), word + b"\x10")
    if kind == 5:
        return frame(DATA, rng.choice((0, END_STREAM, PADDED)), streams.some(), rng.randbytes(rng.choice((0, 5, 300))))
    return frame(rng.choice((PUSH_PROMISE, GOAWAY, CONTINUATION)), rng.randrange(256), streams.some(), word * 2)


def _noise(streams: _Streams, rng: random.Random) -> bytes:
    payload = rng.randbytes(rng.choice((0, 4, 8, 60)))
    claimed = rng.choice((None, None, 0, 16_385, 2**24 - 1))
    return frame(rng.randrange(256), rng.randrange(256), rng.getrandbits(32), payload, length=claimed)


def _window_game(streams: _Streams, rng: random.Random) -> bytes:
    """What a client may do, to no good: windows shut and opened by a byte, pings, weights."""
    kind = rng.randrange(5)
    if kind == 0:  # SETTINGS_INITIAL_WINDOW_SIZE: answers wait for room
        return frame(SETTINGS, 0, 0, struct.pack(">HI", 4, rng.choice((0, 1, 65_535))))
    if kind == 1:
        return frame(WINDOW_UPDATE, 0, rng.choice((0, max(streams.last, 1))), struct.pack(">I", rng.choice((1, 9))))
    if kind == 2:
        return frame(PING, 0, 0, rng.randbytes(8))
    if kind == 3:
        return frame(PRIORITY, 0, max(streams.last, 1), struct.pack(">I", 0) + b"\xff")
    return frame(SETTINGS, 0, 0, struct.pack(">HI", rng.choice((3, 99)), rng.choice((0, 100))))


# Most odd headers and a third of the odd control frames end a connection, as they should.
_PARTS: tuple[tuple[Callable[[_Streams, random.Random], bytes], int], ...] = (
    (_whole_call, 70), (_left_call, 25), (_window_game, 15), (_control, 4), (_odd_headers, 2), (_noise, 1),
)  # fmt: skip


def connection_case(seed: int, length: int) -> Iterator[bytes]:
    """What one connection sends, in ``length`` parts; the preface first, mostly."""
    rng = random.Random(seed)
    streams = _Streams(rng)
    opening = rng.random()
    if opening < 0.04:
        yield rng.choice(
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", PREFACE[:10], rng.randbytes(40), b"\x16\x03\x01\x02\x00\x01")
        )
    else:
        yield PREFACE + frame(SETTINGS, 0, 0, b"")
    for part in rng.choices([part for part, _ in _PARTS], [often for _, often in _PARTS], k=length):
        yield part(streams, rng)
