"""What gRPC writes into HTTP/2 header blocks: of a request, of an answer, of its end.

The protocol: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote, unquote

import grpc
from hpack.hpack import encode_integer

from cluster.wire.http2.messages import ENCODINGS, CallRefused

Headers: TypeAlias = "list[tuple[bytes, bytes]]"
Metadata: TypeAlias = "tuple[tuple[str, str | bytes], ...]"
_CONTENT_TYPE = b"application/grpc"
METADATA_MAX = 1000  # entries of one call's
METADATA_BYTES_MAX = 2**16  # names and values of one call's header block
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_OF_HTTP = frozenset({b"content-type", b"te", b"host", b"content-length"})
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")  # what a grpc-message has as it is
_CODES = {b"%d" % code.value[0]: code for code in grpc.StatusCode}
_STATUS_200 = b"\x88"  # of HPACK's static table
_LENGTHS = [bytes((size,)) for size in range(127)]  # those of one byte (RFC 7541, 5.1)


def _literal(name: bytes, value: bytes) -> bytes:
    """A field that no table keeps (RFC 7541, 6.2.2): it is spelled alike in every block, however many came before."""
    return b"\x00" + _sized(name) + _sized(value)


def _sized(text: bytes) -> bytes:
    size = len(text)
    return (_LENGTHS[size] if size < len(_LENGTHS) else bytes(encode_integer(size, 7))) + text


_BEGINNING = (
    _STATUS_200
    + _literal(b"content-type", _CONTENT_TYPE)
    + _literal(b"grpc-accept-encoding", ",".join(ENCODINGS).encode())
)
_WELL = _literal(b"grpc-status", b"0")


class NotGrpc(Exception):  # noqa: N818 - an answer
    """An HTTP request that is no gRPC call; ``status`` is HTTP's for it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


@dataclass(frozen=True, slots=True)
class CallHead:
    """What a call's header block says.

    ``timeout_s``: from its arrival; ``metadata``: of the caller, keys in order; ``size``: bytes of the whole block.
    """

    path: str
    timeout_s: float | None
    encoding: str
    metadata: Metadata
    size: int


def call_head(headers: Iterable[tuple[bytes, bytes]]) -> CallHead:
    """Reads a request's header block; NotGrpc, or CallRefused for what gRPC does not allow in one."""
    of_http: dict[bytes, bytes] = {}
    metadata: list[tuple[str, str | bytes]] = []
    size = 0
    for name, value in headers:
        size += len(name) + len(value)
        if name.startswith((b":", b"grpc-")) or name in _OF_HTTP:
            of_http[name] = value
        elif size > METADATA_BYTES_MAX or len(metadata) + value.count(b",") > METADATA_MAX:
            limits = f"{METADATA_BYTES_MAX} bytes and {METADATA_MAX} entries"
            raise CallRefused(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"A call's metadata have {limits} at most; send less."
            )
        else:
            metadata += _received(name, value)
    if of_http.get(b":method") != b"POST":
        raise NotGrpc(405)
    content_type = of_http.get(b"content-type", b"")
    if not content_type.startswith(_CONTENT_TYPE) or content_type[len(_CONTENT_TYPE) :][:1] not in (b"", b"+", b";"):
        raise NotGrpc(415)
    timeout = of_http.get(b"grpc-timeout")
    return CallHead(
        of_http.get(b":path", b"").decode("latin-1"),
        None if timeout is None else _timeout_s(timeout),
        of_http.get(b"grpc-encoding", b"identity").decode("latin-1"),
        tuple(metadata),
        size,
    )


def asking(path: str, authority: bytes) -> Headers:
    """The header block of a call that we make."""
    return [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", authority),
        (b"te", b"trailers"), (b"content-type", _CONTENT_TYPE),
    ]  # fmt: skip


def status_of(block: Headers) -> tuple[grpc.StatusCode, str]:
    """How a call has ended, by the last header block of its answer."""
    fields = dict(block)
    number = fields.get(b"grpc-status")
    if number is None:
        status = fields.get(b":status", b"none").decode("latin-1")
        return grpc.StatusCode.UNKNOWN, f"The answer has no status of gRPC's (of HTTP: {status})."
    message = unquote(fields.get(b"grpc-message", b"").decode("latin-1"), errors="replace")
    return _CODES.get(number, grpc.StatusCode.UNKNOWN), message


def beginning(metadata: Metadata = ()) -> bytes:
    """The header block before a call's first message, encoded, as the others are."""
    return b"".join((_BEGINNING, *map(_sent, metadata))) if metadata else _BEGINNING


def ending(code: grpc.StatusCode, message: str, metadata: Metadata = ()) -> bytes:
    """The header block after a call's last message."""
    block = _WELL if code is grpc.StatusCode.OK else _literal(b"grpc-status", b"%d" % code.value[0])
    if message:
        # A blank at either end is no part of a header's value.
        safe = _PLAIN if message.strip(" ") == message else _PLAIN.replace(" ", "")
        block += _literal(b"grpc-message", quote(message, safe=safe, errors="replace").encode())
    return block + b"".join(map(_sent, metadata)) if metadata else block


def refusal(status: int) -> bytes:
    """The whole answer to a request that is no gRPC call."""
    return _literal(b":status", b"%d" % status) + _literal(b"content-length", b"0")


def _timeout_s(value: bytes) -> float:
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        text = "grpc-timeout is no such thing; send up to 8 digits and one of H, M, S, m, u, n."
        raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, text)
    return int(found[1]) * _UNITS_S[found[2]]


def _received(name: bytes, value: bytes) -> Metadata:
    """Values in base64 may be joined by commas, and have padding or not."""
    key = name.decode("latin-1")
    if not name.endswith(b"-bin"):
        return ((key, value.decode("latin-1")),)
    try:
        return tuple(
            (key, base64.b64decode(part + b"=" * (-len(part) % 4), validate=True)) for part in value.split(b",")
        )
    except binascii.Error:
        text = f"The metadata {key[:40]!r} is no base64; metadata ending in -bin has to be."
        raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, text) from None


def _sent(pair: tuple[str, str | bytes]) -> bytes:
    name, value = pair
    if isinstance(value, bytes):
        return _literal(name.encode(), base64.b64encode(value).rstrip(b"="))
    return _literal(name.encode(), value.encode("latin-1", "replace"))
