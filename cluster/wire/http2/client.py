"""A connection that we have opened, and grpcio's asyncio channel's interface over it, as far as this project uses it.

At a fraction of the cost of a message. For two ends that are ours: there is no TLS, nothing is compressed, and nobody
pings; whoever keeps a call open watches for its silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NoReturn, Self

import grpc
import grpc.aio
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from cluster.wire.channel import MAX_MESSAGE_BYTES
from cluster.wire.http2 import headers
from cluster.wire.http2.client_call import ClientCall, Request, Response, rpc_error
from cluster.wire.http2.link import Link
from cluster.wire.http2.protocol import ConnectionProtocol

_LOG = logging.getLogger(__name__)
CONNECT_S = 1.0  # for one attempt; a server that is starved for a moment is not gone
CLOSE_S = 1.0  # for what is still to be sent to a host that may be gone
_OF_RESET: dict[int, grpc.StatusCode] = {
    ErrorCodes.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    ErrorCodes.CANCEL: grpc.StatusCode.CANCELLED,
    ErrorCodes.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class ClientLink(Link):
    """One connection to a server, and the calls on it."""

    def __init__(self, authority: str, largest_message: int) -> None:
        self._h2 = ConnectionProtocol(client_side=True)
        super().__init__(self._h2)
        self._authority, self.largest_message = authority.encode(), largest_message
        self._calls: dict[int, ClientCall[Any, Any]] = {}
        self._on: dict[type[Event], Callable[[Any], None]] = {
            ResponseReceived: self._headers, TrailersReceived: self._headers, DataReceived: self._data,
            StreamEnded: self._stream_ended, StreamReset: self._stream_reset,
            RemoteSettingsChanged: self._settings, ConnectionTerminated: self._terminated,
        }  # fmt: skip

    @property
    def usable(self) -> bool:
        """Whether calls can begin on it."""
        return self._transport is not None and not self._transport.is_closing() and not self._h2.peer_leaves

    @property
    def open(self) -> bool:
        return self._transport is not None

    # ------------------------------------------------------------------------------------------------ asyncio's calls

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end_all(f"The connection to {self._peer} broke{'' if exc is None else f': {exc}'}.")

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._h2.take_in(data):
                take = self._on.get(type(event))
                if take is not None:
                    take(event)
        except ProtocolError as error:
            self._end_all(f"{self._peer} does not speak HTTP/2 as it should: {error}")
            self._leave()
            return
        except Exception as error:  # boundary: whatever it was, nobody may wait for this connection any more
            _LOG.exception("a server's bytes could not be read")
            self._end_all(f"What {self._peer} sent could not be read: {error}")
            self._leave()
            return
        self._outbox.resume_if_opened()
        if self._h2.has_outgoing:
            self.flush()
        if self._h2.peer_leaves:
            self._stay_for_what_it_took(self._h2.peer_took)

    # --------------------------------------------------------------------------------------------------- h2's events

    def _headers(self, event: ResponseReceived | TrailersReceived) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            call.headers = event.headers

    def _data(self, event: DataReceived) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            call.receive(event.data, event.flow_controlled_length)
        elif event.flow_controlled_length:
            self.acknowledge(event.stream_id, event.flow_controlled_length)

    def _stream_ended(self, event: StreamEnded) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            code, message = headers.status_of(call.headers)
            call.end(code, message)
            self.reset_if_open(event.stream_id)

    def _stream_reset(self, event: StreamReset) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            code = _OF_RESET.get(event.error_code or 0, grpc.StatusCode.INTERNAL)
            call.end(code, f"{self._peer} has reset the call (HTTP/2 error {event.error_code}).")

    def _settings(self, event: RemoteSettingsChanged) -> None:
        if SettingCodes.INITIAL_WINDOW_SIZE in event.changed_settings:
            self._outbox.windows_changed()

    def _terminated(self, event: ConnectionTerminated) -> None:
        self._end_all(f"{self._peer} has ended the connection (HTTP/2 error {event.error_code}).")
        self._leave()

    # ---------------------------------------------------------------------------------------------------- for calls

    def begin(self, call: ClientCall[Any, Any]) -> int:
        if not self.usable:
            raise rpc_error(grpc.StatusCode.UNAVAILABLE, f"The connection to {self._peer} has ended.")
        try:
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream_id, headers.asking(call.path, self._authority))
        except ProtocolError as error:
            raise rpc_error(grpc.StatusCode.UNAVAILABLE, f"{self._peer} takes no more calls: {error}") from error
        self._calls[stream_id] = call
        self._flush_soon()
        return stream_id

    def send_end(self, stream_id: int) -> None:
        try:
            self._h2.end_stream(stream_id)
        except ProtocolError as error:
            self._over(stream_id, error)
        self._flush_soon()

    def reset_if_open(self, stream_id: int) -> None:
        """The server has ended a call that we have not: nothing more is for it."""
        if stream_id in self._h2.streams and not self._h2.streams[stream_id].closed:
            self.reset(stream_id, ErrorCodes.NO_ERROR)

    def drop(self, call: ClientCall[Any, Any]) -> None:
        self._calls.pop(call.stream_id, None)
        if self._h2.peer_leaves and not self._calls:
            self._leave()

    def close(self) -> None:
        """Ends what runs, in peace where the other side takes the news of it in time."""
        for call in tuple(self._calls.values()):
            call.cancel()
        self._leave()

    def _stay_for_what_it_took(self, last_stream: int) -> None:
        """The server is leaving: calls beyond ``last_stream`` are for somebody else, and nothing was done for them."""
        for stream_id, call in tuple(self._calls.items()):
            if stream_id > last_stream:
                call.end(grpc.StatusCode.UNAVAILABLE, f"{self._peer} is shutting down.")
        if not self._calls:
            self._leave()

    def _leave(self) -> None:
        if self._transport is not None:
            self._close()
            self._loop.call_later(CLOSE_S, self.abort)

    def _end_all(self, why: str) -> None:
        self._outbox.clear()
        for call in tuple(self._calls.values()):
            call.end(grpc.StatusCode.UNAVAILABLE, why)


class Http2Channel(grpc.aio.Channel):
    """A channel of the running event loop to ``address`` (HOST:PORT): one connection, opened when it is first needed.

    A connection that broke is opened again by the next call. Calls have no deadlines of their own; cancelling the task
    that waits for a unary one ends it.
    """

    def __init__(self, address: str, *, connect_s: float = CONNECT_S, largest_message: int = MAX_MESSAGE_BYTES) -> None:
        self._address, self._connect_s, self._largest = address, connect_s, largest_message
        self._link: ClientLink | None = None
        self._old: list[ClientLink] = []  # whose servers are leaving, with calls that run
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        del grace
        links, self._link, self._old = [*self._old, self._link], None, []
        for link in links:
            if link is not None:
                link.close()

    async def stream(
        self, path: str, serialize: Callable[[Request], bytes], deserialize: Callable[[bytes], Response]
    ) -> ClientCall[Request, Response]:
        """A call of the method ``path`` that both sides stream in; AioRpcError UNAVAILABLE."""
        call = ClientCall(path, serialize, deserialize)
        call.begin(await self._connected())
        return call

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None,
        _registered_method: bool | None = None,  # noqa: FBT001 - grpcio's
    ) -> Any:  # fmt: skip
        del _registered_method

        async def ask(request: Any) -> Any:
            call = await self.stream(method, request_serializer, response_deserializer)
            try:
                await _written(call, request)
                answer = await call.read()
                if answer is None:
                    raise rpc_error(grpc.StatusCode.INTERNAL, f"{self._address} ended the call without an answer.")
                await call.read()
                return answer
            finally:
                call.cancel()

        return ask

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        del args, options
        return self._not_here

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        del args, options
        return self._not_here

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        """Stubs name all methods of a service; ``stream`` is how one begins."""
        del args, options
        return self._not_here

    async def channel_ready(self) -> None:
        await self._connected()

    def get_state(self, try_to_connect: bool = False) -> NoReturn:  # noqa: FBT001, FBT002 - grpcio's
        del try_to_connect
        self._not_here()

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> NoReturn:
        del last_observed_state
        self._not_here()

    def _not_here(self, *args: object, **options: object) -> NoReturn:
        del args, options
        raise grpc.aio.UsageError("This channel has unary calls and `stream`; take grpc.aio's for anything else.")

    async def _connected(self) -> ClientLink:
        async with self._connecting:
            if self._link is not None and self._link.usable:
                return self._link
            self._old = [link for link in (*self._old, self._link) if link is not None and link.open]
            host, _, port = self._address.rpartition(":")
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(self._connect_s):
                    _, self._link = await loop.create_connection(
                        lambda: ClientLink(self._address, self._largest), host.strip("[]"), int(port)
                    )
            except (OSError, TimeoutError) as error:
                why = f"{type(error).__name__}: {error}".rstrip(": ")
                raise rpc_error(grpc.StatusCode.UNAVAILABLE, f"{self._address} cannot be reached ({why}).") from error
            return self._link


async def _written(call: ClientCall[Request, Response], request: Request) -> None:
    """A server may answer before it has read all."""
    try:
        await call.write(request)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.OK:
            raise
    call.done_writing()
