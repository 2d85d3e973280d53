"""One call on a connection: what its handler asks of it, as grpcio's asyncio server would answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio
from h2.errors import ErrorCodes

from cluster.wire.http2 import headers
from cluster.wire.http2.headers import CallHead, Metadata
from cluster.wire.http2.messages import CallRefused, MessageReader, Received, framed
from cluster.wire.http2.sending import Sending

_LOG = logging.getLogger(__name__)
TAKEN_TOGETHER_MAX = 256  # messages of one caller before others get their turn
ABORT_S = 1.0  # for a message that is half out, so that a status can follow it
# How gRPC's clients are told a status by the reset of a stream, where no status can follow; otherwise CANCEL.
_RESETS = {
    grpc.StatusCode.UNAVAILABLE: ErrorCodes.REFUSED_STREAM,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorCodes.ENHANCE_YOUR_CALM,
}
_EXPIRED = "Deadline Exceeded"
_ONE_MESSAGE = "This method takes exactly one message; send one."


class Wire(Protocol):
    """The connection, as a call uses it. Streams that are gone are its business: nothing here fails for them."""

    largest_message: int
    answer_stall_s: float

    def send_headers(self, stream_id: int, block: bytes, *, last: bool) -> None: ...

    def acknowledge(self, stream_id: int, size: int) -> None:
        """The client may send ``size`` bytes more."""
        ...

    def send(self, call: Sending, data: bytes) -> memoryview | None:
        """Sends ``data`` on the call's stream; what there is no room for now is returned.

        ``call.unsent`` is taken up by itself when there is room.
        """
        ...

    def send_now(self, call: Sending, data: bytes) -> memoryview | None:
        """``send``, and it goes out with all that waits for the end of the event loop's turn."""
        ...

    def forget_unsent(self, call: Sending) -> None: ...

    def reset(self, stream_id: int, code: ErrorCodes) -> None: ...

    def drop(self, call: ServerCall) -> None:
        """Nobody works on it any more."""
        ...

    @property
    def peer(self) -> str: ...


class ServerCall(Sending, grpc.aio.ServicerContext[Any, Any]):
    """The context of one call's handler, and its state.

    ``write`` returns when the transport has taken the message, which is at once while the client keeps up. A handler
    that is cancelled without the call having ended resets the stream. A client that sends on while a message of its
    waits for the handler may send a window's bytes more.
    """

    __slots__ = (
        "_aborted", "_began", "_code", "_deadline_s", "_details", "_done", "_ended", "_entered", "_expired",
        "_handler", "_head", "_loop", "_more", "_reader", "_timer", "_trailing", "_wire", "ended_as", "gone",
        "half_closed", "held", "owed", "served", "task",
    )  # fmt: skip

    def __init__(self, wire: Wire, stream_id: int, head: CallHead, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
        """CallRefused where its messages could not be read."""
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._wire, self.stream_id, self._head, self._handler = wire, stream_id, head, handler
        self._reader = MessageReader(head.encoding, wire.largest_message)
        self._more: asyncio.Event | None = None  # a handler waits for messages or the end of them
        self._aborted = self._began = self._ended = self._entered = self._expired = False
        self.gone = False  # the client has left, or its connection
        self.served = False  # its handler has seen it
        self.ended_as: grpc.StatusCode | None = None  # what its client was told
        self.half_closed = False  # the client sends nothing more
        self.held = head.size  # bytes that the connection has counted for it
        self.owed = 0  # bytes that came and that the client does not know to be read
        self._code, self._details, self._trailing = grpc.StatusCode.OK, "", ()
        self._done: list[Callable[[Any], None]] = []
        self.task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline_s: float | None = None
        if head.timeout_s is not None:
            self._deadline_s = self._loop.time() + head.timeout_s
            self._timer = self._loop.call_at(self._deadline_s, self._expire)

    # ------------------------------------------------------------------------------------------ from the connection

    def receive(self, data: bytes) -> bool:
        """Takes a part of the client's messages, and says whether it brings the call further; CallRefused."""
        reader = self._reader
        reader.add(data)
        whole = reader.ready()
        if not self._handler.request_streaming:
            self._acknowledge()  # one message is bounded, and who sends no end of it may not hold up the others
            if whole and reader.more_than_one:
                raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, _ONE_MESSAGE)
        elif not whole:
            self._acknowledge()
        elif self._more is not None:
            self._more.set()
        return whole and bool(data)  # behind a whole message a window bounds it

    def receive_end(self) -> None:
        """The client has sent all; CallRefused."""
        self.half_closed = True
        if self._more is not None:
            self._more.set()
        if not self._handler.request_streaming and self.task is None and not self._reader.ready():
            raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, _ONE_MESSAGE)

    def _acknowledge(self) -> None:
        owed, self.owed = self.owed, 0
        if owed:
            self._wire.acknowledge(self.stream_id, owed)

    def _take(self) -> Received | None:
        """The next message; CallRefused, also for a part of one that is all that will come."""
        taken = self._reader.take()
        if not self._reader.holds_more:
            self._acknowledge()
        if taken is None and self.half_closed and self._reader.untaken:
            raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, "The last message has no end; send all of it.")
        return taken

    @property
    def path(self) -> str:
        return self._head.path

    @property
    def can_start(self) -> bool:
        return self.task is None and not self._ended and (self._handler.request_streaming or self.half_closed)

    def start(self) -> None:
        """Runs the handler; with its end the connection drops the call. Nobody cancels the task but ``cancel``."""
        self.task = self._loop.create_task(self._run())

    def leave(self) -> None:
        """The client or its connection is gone: nothing is sent any more."""
        self.gone = self._ended = True
        self.cancel()

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()
            if not self._entered:  # then it never will be
                self._loop.call_soon(self._wire.drop, self)

    def refuse(self, code: grpc.StatusCode, message: str) -> None:
        """Ends the call with a status, before its handler runs or while it does."""
        self._end(code, message)
        if self.task is None:
            self._wire.drop(self)
        else:
            self.cancel()

    def close(self) -> None:
        """Nobody works on it any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self.owed:
            self._acknowledge()  # the connection's window is everybody's
        if not self._ended:  # cancelled without a word
            self._ended = True
            if self.unsent is not None:
                self._wire.forget_unsent(self)
            self._wire.reset(self.stream_id, ErrorCodes.CANCEL)
        for callback in self._done:
            callback(self)
        self.task = None  # whose error knows us: what has ended is not to wait for the collector

    # --------------------------------------------------------------------------------------------------- the handler

    async def _run(self) -> None:
        self._entered = True
        handler: Any = self._handler
        try:
            request: Any = self._requests() if handler.request_streaming else self._only_request()
            self.served = True
            if handler.response_streaming:
                behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
                answered = behaviour(request, self)
                if hasattr(answered, "__aiter__"):
                    async for response in answered:
                        await self.write(response)
                else:
                    await answered
            else:
                behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
                self._send(await behaviour(request, self))
                if self.unsent is not None:
                    await self._until_read()
            self._end(self._code, self._details, self._trailing)
        except grpc.aio.AbortError:
            pass  # its status is out
        except CallRefused as refused:
            self._end(refused.code, str(refused))
        except Exception as error:  # boundary: a bug must cost one call only, and be told
            if not self.gone:
                _LOG.exception("the handler of %s failed", self._head.path)
                self._end(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error).__name__}: {error}")
        finally:
            self._wire.drop(self)

    def _only_request(self) -> Any:
        taken = self._reader.take()
        assert taken is not None, "receive_end has seen it"
        return self._request(taken)

    def _request(self, received: Received) -> Any:
        message, deserialize = self._reader.plain(received), self._handler.request_deserializer
        if deserialize is None:
            return message
        try:
            return deserialize(message)
        except Exception:  # boundary: any library's decoder, on what a stranger sent
            raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, "The message cannot be decoded.") from None

    async def _requests(self) -> AsyncIterator[Any]:
        self._more = asyncio.Event()
        taken_together = 0
        while True:
            self._more.clear()
            try:
                while (taken := self._take()) is not None:
                    yield self._request(taken)
                    taken_together += 1
                    if taken_together % TAKEN_TOGETHER_MAX == 0:
                        await asyncio.sleep(0)  # a window of small messages is much work
            except CallRefused as refused:
                self.refuse(refused.code, str(refused))
                raise
            if self.half_closed:
                return
            await self._more.wait()

    async def read(self) -> Any:
        """The next message of a streaming client; grpc.aio.EOF after the last one."""
        async for request in self._requests():
            return request
        return grpc.aio.EOF

    async def write(self, message: Any) -> None:
        if self.unsent is not None and not self._ended:  # of a write that was cancelled
            await self._until_drained()
        self._send(message)
        if self.unsent is not None:
            await self._until_drained()

    def _send(self, message: Any) -> None:
        """As much of it as there is room for."""
        if self._ended:
            raise asyncio.InvalidStateError("The call has ended.")
        if not self._began:
            self._begin(())
        self.unsent = self._wire.send(self, self._framed(message))

    async def _until_read(self) -> None:
        """The only answer is out; CallRefused when its client reads nothing for a while: it lies in our memory."""
        limit_s = self._wire.answer_stall_s
        while (unsent := self.unsent) is not None:
            try:
                async with asyncio.timeout(limit_s):
                    await self._until_drained()
            except TimeoutError:
                if self.unsent is None or len(self.unsent) < len(unsent):
                    continue
                _LOG.warning("the client %s of %s does not read its answer", self.peer(), self._head.path)
                text = f"The client has read nothing of the answer for {limit_s:g} s; read it as it comes."
                raise CallRefused(grpc.StatusCode.CANCELLED, text) from None

    def _framed(self, message: Any) -> bytes:
        serialize = self._handler.response_serializer
        return framed(serialize(message) if serialize else message)

    @property
    def writable(self) -> bool:
        """Whether ``push`` may be called; not while ``abort`` waits to be the last."""
        return self.unsent is None and not self._ended and not self._aborted

    def push(self, message: Any) -> None:
        """``write`` without waiting, and all that the connection was to send goes out at once; while ``writable``."""
        if self._ended:
            raise asyncio.InvalidStateError("The call has ended.")
        assert self.writable, "look first"
        if not self._began:
            self._begin(())
        self.unsent = self._wire.send_now(self, self._framed(message))

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        assert not self._began, "it is out"
        if not self._ended:
            self._begin(tuple(initial_metadata))

    def _begin(self, metadata: Metadata) -> None:
        self._began = True
        self._wire.send_headers(self.stream_id, headers.beginning(metadata), last=False)

    def _end(self, code: grpc.StatusCode, message: str, metadata: Metadata = ()) -> None:
        """The status goes out, nothing after it. Behind half a message none can: then the stream is reset."""
        if self._ended:
            return
        self._ended, self.ended_as = True, code
        if self.unsent is not None:
            self._wire.forget_unsent(self)
        if self.unsent_began:
            self._wire.reset(self.stream_id, _RESETS.get(code, ErrorCodes.CANCEL))
            return
        block = headers.ending(code, message, metadata)
        self._wire.send_headers(self.stream_id, block if self._began else headers.beginning() + block, last=True)
        if not self.half_closed:
            self._wire.reset(self.stream_id, ErrorCodes.NO_ERROR)

    def _expire(self) -> None:
        self._expired = True
        self.refuse(grpc.StatusCode.DEADLINE_EXCEEDED, _EXPIRED)

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Waits for a message that is half out, so that the status can follow it; without that the stream is reset.

        The reset says what gRPC's clients take for the status, where there is such a one.
        """
        self._aborted = True
        try:
            if self.unsent_began and not self._ended:
                with suppress(TimeoutError):
                    async with asyncio.timeout(ABORT_S):
                        await self._until_drained()
        finally:  # whoever gives up waiting as well
            self._end(code, details, (*self._trailing, *trailing_metadata))
        raise grpc.aio.AbortError(f"{code.name}: {details}")

    async def abort_with_status(self, status: Any) -> NoReturn:
        self._trailing = ()
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._trailing = tuple(trailing_metadata)

    def invocation_metadata(self) -> Any:
        return self._head.metadata

    def time_remaining(self) -> Any:
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self._loop.time())

    def set_code(self, code: Any) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def code(self) -> Any:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing

    def cancelled(self) -> bool:
        return self.gone or self._expired

    def done(self) -> bool:
        return self._ended

    def add_done_callback(self, callback: Any) -> None:
        self._done.append(callback)

    def peer(self) -> str:
        return self._wire.peer

    def set_compression(self, compression: Any) -> None:
        """Answers are never compressed, which is every server's right."""

    def disable_next_message_compression(self) -> None:
        """They are not compressed anyway."""

    def peer_identities(self) -> Iterable[bytes] | None:
        return None

    def peer_identity_key(self) -> str | None:
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        return {}
