"""gRPC's messages on a stream: five bytes of prefix each, perhaps compressed.

The protocol: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import TypeAlias

import grpc

_PREFIX = struct.Struct(">BI")  # whether it is compressed, and its length
# By grpc-encoding; both bounded by whoever calls ``decompress`` with a length.
_DECOMPRESSORS: dict[str, Callable[[], zlib._Decompress]] = {
    "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "deflate": zlib.decompressobj,
}
ENCODINGS = ("identity", *_DECOMPRESSORS)
# Decompressed. A prompt of 1,000,000 tokens is 3 MB as ids and some 8 MB as text; without bounds of its own, a few
# kilobytes of zeros would be as large as any message, and stop all calls while they are decoded. The ratio is the one
# that Envoy's decompressor goes by; texts get some four times as short.
INFLATED_BYTES_MAX = 16 * 2**20
INFLATED_RATIO_MAX = 100
INFLATED_ALWAYS_BYTES = 2**20


Received: TypeAlias = "tuple[bytes, bool]"  # a message as it came, and whether it is compressed


class CallRefused(Exception):  # noqa: N818 - an answer
    """What came is no call that can be served; ``code`` and the sentence are for its sender."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def framed(message: bytes) -> bytes:
    """``message``, uncompressed, as it goes over a stream."""
    return _PREFIX.pack(0, len(message)) + message


class MessageReader:
    """Cuts what comes on a stream into messages of at most ``largest`` bytes, and decompresses them.

    Bytes stay bytes until somebody takes the message: many small ones that nobody takes cost what they are long.
    """

    __slots__ = ("_compressed", "_encoding", "_end", "_largest", "_rest")

    def __init__(self, encoding: str, largest: int) -> None:
        """CallRefused for an ``encoding`` (grpc-encoding) that is none of ``ENCODINGS``."""
        if encoding not in ENCODINGS:
            known = ", ".join(ENCODINGS)
            raise CallRefused(
                grpc.StatusCode.UNIMPLEMENTED, f"Messages cannot be decompressed from {encoding[:40]!r}; use {known}."
            )
        self._encoding, self._largest = encoding, largest
        self._rest = bytearray()
        self._end = 0  # of the first message, with its prefix; 0 while that has not come
        self._compressed = False

    def add(self, data: bytes) -> None:
        self._rest += data

    @property
    def untaken(self) -> int:
        """Bytes that nobody has taken, whole messages or not."""
        return len(self._rest)

    @property
    def more_than_one(self) -> bool:
        """Whether something comes behind the first message, which was found to be ``ready``."""
        return len(self._rest) > self._end

    @property
    def holds_more(self) -> bool:
        """Whether there is more for whoever takes: a whole message, or why there can be none."""
        try:
            return self.ready()
        except CallRefused:
            return True

    def ready(self) -> bool:
        """Whether a message is whole; CallRefused for one that is too long or not what its prefix says."""
        rest = self._rest
        if not self._end:
            if len(rest) < _PREFIX.size:
                return False
            compressed, length = _PREFIX.unpack_from(rest)
            if length > self._largest:
                raise self._too_long()
            if compressed > 1:
                raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, "What was sent is no gRPC message.")
            self._end, self._compressed = _PREFIX.size + length, bool(compressed)
        return len(rest) >= self._end

    def take(self) -> Received | None:
        """The first message, once it is whole; CallRefused as ``ready``."""
        rest = self._rest
        if not (rest and self.ready()):
            return None
        end, self._end = self._end, 0
        payload = bytes(memoryview(rest)[_PREFIX.size : end])
        if end == len(rest):
            rest.clear()
        else:
            del rest[:end]
        return payload, self._compressed

    def plain(self, message: Received) -> bytes:
        """``message`` decompressed, when somebody wants it and not before: it may be much longer then.

        CallRefused for what cannot be decompressed or is too long.
        """
        payload, compressed = message
        return self._decompressed(payload) if compressed else payload

    def _too_long(self) -> CallRefused:
        text = f"The message is longer than {self._largest} bytes, which is the limit; send less at once."
        return CallRefused(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    def _inflated_too_long(self, limit: int) -> CallRefused:
        text = f"The message is longer than {limit} bytes when it is decompressed, which is the limit for that"
        if limit < INFLATED_BYTES_MAX:
            text = f"The message is more than {INFLATED_RATIO_MAX} times as long when it is decompressed"
        advice = "send it as it is" if limit < self._largest else "send less at once"
        return CallRefused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{text}; {advice}.")

    def _decompressed(self, message: bytes) -> bytes:
        try:
            make = _DECOMPRESSORS[self._encoding]
        except KeyError:
            text = "The message is compressed and its grpc-encoding does not say how; name it."
            raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, text) from None
        by_ratio = max(INFLATED_RATIO_MAX * len(message), INFLATED_ALWAYS_BYTES)
        decompressor, limit = make(), min(self._largest, INFLATED_BYTES_MAX, by_ratio)
        try:
            plain = decompressor.decompress(message, limit + 1)
        except zlib.error:
            plain = b""
        if len(plain) > limit:
            raise self._inflated_too_long(limit)
        if not decompressor.eof:
            text = f"The message cannot be decompressed as {self._encoding}, which its grpc-encoding says."
            raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, text)
        return plain
