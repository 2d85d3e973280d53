from __future__ import annotations

import grpc
import pytest
from hpack import Decoder

from cluster.wire.http2 import headers
from cluster.wire.http2.headers import NotGrpc, call_head
from cluster.wire.http2.messages import CallRefused

CALL = {b":method": b"POST", b":scheme": b"http", b":path": b"/a.B/C", b"te": b"trailers",
        b"content-type": b"application/grpc"}  # fmt: skip


def decoded(encoded: bytes) -> dict[bytes, bytes]:
    return {bytes(name): bytes(value) for name, value in Decoder().decode(encoded, raw=True)}


def block(**more: bytes) -> list[tuple[bytes, bytes]]:
    return list((CALL | {name.replace("_", "-").encode(): value for name, value in more.items()}).items())


def test_a_head_of_a_call() -> None:
    head = call_head(block(grpc_timeout=b"250m", grpc_encoding=b"gzip", x_tenant=b"one", user_agent=b"me"))
    assert (head.path, head.timeout_s, head.encoding) == ("/a.B/C", 0.25, "gzip")
    assert head.metadata == (("x-tenant", "one"), ("user-agent", "me"))


@pytest.mark.parametrize(
    ("value", "seconds"), [(b"2H", 7200), (b"3M", 180), (b"5S", 5), (b"7m", 7e-3), (b"11u", 11e-6), (b"99999999n", 0.1)]
)
def test_timeouts(value: bytes, seconds: float) -> None:
    assert call_head(block(grpc_timeout=value)).timeout_s == pytest.approx(seconds)


@pytest.mark.parametrize("value", [b"", b"5", b"S", b"-1S", b"123456789S", b"1.5S", b"1s", "٣S".encode()])
def test_what_is_no_timeout_is_refused(value: bytes) -> None:
    with pytest.raises(CallRefused, match="grpc-timeout") as refused:
        call_head(block(grpc_timeout=value))
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("value", [b"AAE=", b"AAE"])
def test_metadata_in_base64_is_bytes_with_padding_or_without(value: bytes) -> None:
    assert call_head(block(trace_bin=value)).metadata == (("trace-bin", b"\x00\x01"),)


def test_several_values_of_one_key() -> None:
    assert call_head(block(trace_bin=b"AA,AQ==")).metadata == (("trace-bin", b"\x00"), ("trace-bin", b"\x01"))


def test_what_is_no_base64_is_refused() -> None:
    with pytest.raises(CallRefused, match="trace-bin"):
        call_head(block(trace_bin=b"!"))


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        (b":method", b"GET", 405),
        (b"content-type", b"application/json", 415),
        (b"content-type", b"application/grpcish", 415),
        (b"content-type", b"", 415),
    ],
)
def test_what_is_no_grpc_gets_an_answer_of_http(name: bytes, value: bytes, status: int) -> None:
    with pytest.raises(NotGrpc) as refused:
        call_head(list((CALL | {name: value}).items()))
    assert refused.value.status == status
    assert decoded(headers.refusal(status))[b":status"] == str(status).encode()


@pytest.mark.parametrize("value", [b"application/grpc+proto", b"application/grpc;charset=utf-8"])
def test_kinds_of_grpc(value: bytes) -> None:
    assert call_head(block(content_type=value)).path == "/a.B/C"


def test_an_ending_is_printable_ascii() -> None:
    found = decoded(headers.ending(grpc.StatusCode.NOT_FOUND, "100 % é\n", (("trace-bin", b"\x00\x01"), ("x-a", "b"))))
    assert found == {
        b"grpc-status": b"5", b"grpc-message": b"100 %25 %C3%A9%0A", b"trace-bin": b"AAE", b"x-a": b"b",
    }  # fmt: skip


def test_a_beginning_tells_how_to_compress() -> None:
    assert decoded(headers.beginning((("x-request-id", "7"),))) == {
        b":status": b"200", b"content-type": b"application/grpc", b"grpc-accept-encoding": b"identity,gzip,deflate",
        b"x-request-id": b"7",
    }  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [{"trace_bin": b"," * 60_000}, {"x_long": b"x" * 70_000}, {f"x_{index}": b"x" * 100 for index in range(700)}],
    ids=["values", "bytes", "together"],
)
def test_more_metadata_than_a_call_needs_are_refused_before_they_are_decoded(given: dict[str, bytes]) -> None:
    with pytest.raises(CallRefused, match="metadata") as refused:
        call_head(block(**given))
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_blanks_at_the_ends_of_a_message_are_kept() -> None:
    found = decoded(headers.ending(grpc.StatusCode.UNKNOWN, " a b "))
    assert found[b"grpc-message"] == b"%20a%20b%20"
    assert headers.status_of(list(found.items())) == (grpc.StatusCode.UNKNOWN, " a b ")


def test_an_ending_can_always_be_written() -> None:
    found = decoded(headers.ending(grpc.StatusCode.UNKNOWN, "half a \ud800 pair", (("x-a", "\u4e00"),)))
    assert found[b"grpc-message"] == b"half a ? pair"
    assert found[b"x-a"] == b"?"


def test_fields_of_any_length_come_out_as_they_went_in() -> None:
    for size in (0, 1, 126, 127, 128, 300, 20_000):
        assert decoded(headers.ending(grpc.StatusCode.OK, "", (("x-a", "v" * size),)))[b"x-a"] == b"v" * size
