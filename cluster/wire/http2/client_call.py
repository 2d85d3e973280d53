"""One call that we make, from our side: its messages, and the status that it ends with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import grpc
import grpc.aio
from h2.errors import ErrorCodes

from cluster.wire.http2.headers import Headers
from cluster.wire.http2.messages import CallRefused, MessageReader, framed
from cluster.wire.http2.sending import Sending

Request = TypeVar("Request")
Response = TypeVar("Response")
_CANCELLED = "This side has ended the call."


class Wire(Protocol):
    """The connection, as a call uses it. Streams that are gone are its business: nothing here fails for them."""

    largest_message: int

    def begin(self, call: ClientCall[Any, Any]) -> int:
        """Sends the call's first headers; the id of its stream. AioRpcError UNAVAILABLE."""
        ...

    def acknowledge(self, stream_id: int, size: int) -> None: ...

    def send(self, call: Sending, data: bytes) -> memoryview | None:
        """What there was no room for; it is ``call.unsent`` by the time that there is."""
        ...

    def send_now(self, call: Sending, data: bytes) -> memoryview | None:
        """``send``, and it goes out with all that waits for the end of the event loop's turn."""
        ...

    def send_end(self, stream_id: int) -> None: ...

    def forget_unsent(self, call: Sending) -> None: ...

    def reset(self, stream_id: int, code: ErrorCodes) -> None: ...

    def drop(self, call: ClientCall[Any, Any]) -> None:
        """The call has ended."""
        ...


class ClientCall(Sending, Generic[Request, Response]):
    """Reads as grpcio's: ``write``, ``read``, ``cancel``; ``each`` and ``push`` save a task's turn for each message.

    One task writes and one reads at a time. What nobody reads costs a window's bytes, then the other side waits. After
    the end, ``read`` raises AioRpcError with its status unless that is OK, and ``write`` with any.
    """

    __slots__ = (
        "_deserialize", "_left", "_news", "_owed", "_reader", "_serialize", "_take", "_wire", "headers", "path",
        "status",
    )  # fmt: skip

    def __init__(
        self, path: str, serialize: Callable[[Request], bytes], deserialize: Callable[[bytes], Response]
    ) -> None:
        super().__init__()
        self.path = path
        self._serialize, self._deserialize = serialize, deserialize
        self._wire: Wire | None = None
        self._reader: MessageReader | None = None
        self.headers: Headers = []  # what came last of them
        self.status: tuple[grpc.StatusCode, str] | None = None  # how it has ended
        self._left = False  # by our side
        self._owed = 0  # bytes that came and that the other side does not know to be read
        self._take: Callable[[Response], None] | None = None
        self._news: asyncio.Future[None] | None = None  # whoever reads waits for it

    # ------------------------------------------------------------------------------------------------ for its user

    def begin(self, wire: Wire) -> None:
        """On a connection; AioRpcError when that is none any more, or the call was cancelled before."""
        if self.status is not None:
            self._fail()
        self._wire = wire
        self._reader = MessageReader("identity", wire.largest_message)  # we tell nobody that we read any other
        self.stream_id = wire.begin(self)

    async def write(self, message: Request) -> None:
        """Returns when the transport has taken ``message``, which is at once while the other side keeps up."""
        if self.status is not None:
            self._fail()
        wire = self._wire
        assert wire is not None, "it has begun"
        if self.unsent is not None:  # of a write that was cancelled
            await self._room()
        self.unsent = wire.send(self, framed(self._serialize(message)))
        if self.unsent is not None:
            await self._room()

    @property
    def writable(self) -> bool:
        """Whether ``push`` may be called."""
        return self.unsent is None and self.status is None

    def push(self, message: Request) -> None:
        """``write`` without waiting, and all that the connection was to send goes out at once; while ``writable``."""
        assert self._wire is not None, "it has begun"
        assert self.writable, "look first whether it is writable"
        self.unsent = self._wire.send_now(self, framed(self._serialize(message)))

    def done_writing(self) -> None:
        """Nothing more comes from this side. After the last write has returned."""
        if self.status is None and self._wire is not None:
            self._wire.send_end(self.stream_id)

    async def read(self) -> Response | None:
        """The next message; None after the last one of a call that went well."""
        assert self._reader is not None, "it has begun"
        while True:
            response = self._next(self._reader)
            if response is not None:
                return response
            if self.status is not None:
                self._check_end(self._reader)
                return None
            await self._until_news()

    async def each(self, take: Callable[[Response], None]) -> None:
        """Gives ``take`` each message in the turn of the event loop that brings it, until the call ends.

        Returns at a good end, raises AioRpcError at any other. What ``take`` raises ends the call and is raised.
        """
        assert self._reader is not None, "it has begun"
        try:
            while not self._left and (response := self._next(self._reader)) is not None:
                take(response)
        except Exception:  # boundary: of whoever reads, as in ``receive``
            self.cancel()
            raise
        self._take = take
        try:
            while self.status is None:
                await self._until_news()
        finally:
            self._take = None
        self._check_end(self._reader)

    def cancel(self) -> None:
        """Ends the call at once, unless it has ended; ``each`` gives nothing more."""
        self._left = True
        if self.status is None and self._wire is not None:
            self._wire.reset(self.stream_id, ErrorCodes.CANCEL)
        self.end(grpc.StatusCode.CANCELLED, _CANCELLED)

    # ------------------------------------------------------------------------------------------ from the connection

    def receive(self, data: bytes, size: int) -> None:
        """Takes a part of the answers, ``size`` bytes on the stream."""
        self._owed += size
        reader = self._reader
        assert reader is not None, "it has begun"
        reader.add(data)
        try:
            if self._take is None:
                if not reader.holds_more:
                    self._acknowledge()
            else:
                while self._heard and (response := self._next(reader)) is not None:
                    self._take(response)
                self._acknowledge()
        except Exception as error:  # boundary: of whoever reads; it is told
            self._tell(error)
            self.cancel()
        else:
            if self._take is None:
                self._tell(None)

    @property
    def _heard(self) -> bool:
        """Whether the call goes on and ``each`` still waits for what comes."""
        return self.status is None and self._news is not None and not self._news.done()

    def end(self, code: grpc.StatusCode, message: str) -> None:
        """The first end counts."""
        if self.status is not None:
            return
        self.status = code, message
        self._acknowledge()  # the connection's window is everybody's
        if self._wire is not None:
            self._wire.forget_unsent(self)
            self._wire.drop(self)
        self._wake_writer()
        self._tell(None)

    # ------------------------------------------------------------------------------------------------------- inner

    def _next(self, reader: MessageReader) -> Response | None:
        try:
            taken = reader.take()
            message = None if taken is None else reader.plain(taken)
        except CallRefused as refused:
            self._reset(refused.code, str(refused))
            return None
        if self._take is None and not reader.holds_more:  # else whoever brings the next ones does it, once for all
            self._acknowledge()
        return None if message is None else self._deserialize(message)

    def _reset(self, code: grpc.StatusCode, message: str) -> None:
        if self.status is None and self._wire is not None:
            self._wire.reset(self.stream_id, ErrorCodes.CANCEL)
        if self.status is not None and self.status[0] is grpc.StatusCode.OK:  # which is what the other side thinks
            self.status = code, message
        self.end(code, message)

    def _acknowledge(self) -> None:
        owed, self._owed = self._owed, 0
        if owed and self._wire is not None:
            self._wire.acknowledge(self.stream_id, owed)

    def _tell(self, error: Exception | None) -> None:
        news = self._news
        if news is not None and not news.done():
            if error is None:
                news.set_result(None)
            else:
                news.set_exception(error)

    async def _until_news(self) -> None:
        self._news = asyncio.get_running_loop().create_future()
        try:
            await self._news
        finally:
            self._news = None

    async def _room(self) -> None:
        await self._until_drained()
        if self.status is not None:
            self._fail()

    def _check_end(self, reader: MessageReader) -> None:
        """Of a call that has ended and whose messages are taken: AioRpcError unless the end is a good one."""
        if self.status is not None and self.status[0] is not grpc.StatusCode.OK:
            self._fail()
        if reader.untaken and not self._left:
            raise rpc_error(grpc.StatusCode.INTERNAL, "The answer ends with half a message.")

    def _fail(self) -> NoReturn:
        assert self.status is not None, "it has ended"
        raise rpc_error(*self.status)


def rpc_error(code: grpc.StatusCode, message: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=message)
