from __future__ import annotations

import gzip
import itertools
import zlib

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.wire.http2.messages import ENCODINGS, CallRefused, MessageReader, framed

LARGEST = 1000


def read(reader: MessageReader, data: bytes) -> list[bytes]:
    reader.add(data)
    return [reader.plain(message) for message in iter(reader.take, None)]


def compressed(message: bytes) -> bytes:
    return b"\x01" + len(message).to_bytes(4, "big") + message


@given(messages=st.lists(st.binary(max_size=50), max_size=6), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_messages_come_out_as_they_went_in_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(map(framed, messages))
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    reader = MessageReader("identity", LARGEST)
    got = [one for start, end in itertools.pairwise(edges) for one in read(reader, whole[start:end])]
    assert got == messages
    assert reader.untaken == 0


def test_a_message_that_comes_byte_by_byte_is_not_copied_for_each() -> None:
    reader, message = MessageReader("identity", 10**7), bytes(10**6)
    whole = framed(message)
    reader.add(whole[:10])
    before = id(reader._rest)
    for byte in whole[10:5000]:
        reader.add(bytes([byte]))
        assert not reader.ready()
    assert id(reader._rest) == before
    assert read(reader, whole[5000:]) == [message]


def test_what_has_not_come_whole_is_unfinished() -> None:
    reader = MessageReader("identity", LARGEST)
    assert read(reader, framed(b"ready") + framed(b"not yet")[:-2]) == [b"ready"]
    assert reader.untaken == 5 + 7 - 2


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)], ids=["gzip", "deflate"]
)
def test_compressed_messages(encoding: str, compress: object) -> None:
    assert callable(compress)
    reader = MessageReader(encoding, LARGEST)
    assert read(reader, compressed(compress(b"x" * LARGEST)) + framed(b"plain")) == [b"x" * LARGEST, b"plain"]


@pytest.mark.parametrize(
    ("encoding", "sent", "code"),
    [
        ("identity", b"\x00\x00\x00\x03\xe9", grpc.StatusCode.RESOURCE_EXHAUSTED),  # before its bytes have come
        ("gzip", compressed(gzip.compress(b"x" * (LARGEST + 1))), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("gzip", compressed(gzip.compress(b"x" * 10**7)), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("gzip", compressed(b"no gzip"), grpc.StatusCode.INVALID_ARGUMENT),
        ("gzip", compressed(gzip.compress(b"cut off")[:-4]), grpc.StatusCode.INVALID_ARGUMENT),
        ("identity", compressed(b"how?"), grpc.StatusCode.INVALID_ARGUMENT),
        ("identity", b"\x02\x00\x00\x00\x00", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_what_cannot_be_a_message_is_refused(encoding: str, sent: bytes, code: grpc.StatusCode) -> None:
    with pytest.raises(CallRefused) as refused:
        read(MessageReader(encoding, LARGEST), sent)
    assert refused.value.code is code


def test_an_unknown_compression_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(CallRefused, match=", ".join(ENCODINGS)) as refused:
        MessageReader("snappy", LARGEST)
    assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED
