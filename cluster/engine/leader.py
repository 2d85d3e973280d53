"""The leader's gRPC face (adapter): cluster.v1.Engine on an event loop of its own, beside the compute thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc
import grpc.aio
import uvloop

from cluster.domain.clock import Clock
from cluster.domain.errors import EngineFailed
from cluster.domain.request import SequenceEnd
from cluster.engine.block_events import BlockLog
from cluster.engine.loop import Cancel, CancelSession, EngineLoop, Published, Submit, refused_for_capacity
from cluster.engine.progress import RankProgress
from cluster.engine.sequence import Sequence
from cluster.engine.session_writer import SessionWriter
from cluster.engine.sessions import Outbox, Sessions
from cluster.engine.step import SequenceKey, SequenceProgress
from cluster.telemetry.logs import get_logger
from cluster.v1 import engine_pb2, engine_pb2_grpc
from cluster.wire.channel import bind
from cluster.wire.convert import load_to_message, sampling_from_message
from cluster.wire.http2.sending import PushedCall
from cluster.wire.http2.server import Http2Server

BEAT_S = 0.5
_HELLO_DEADLINE_S = 10.0
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_START_DEADLINE_S = 30.0


class SessionCall(PushedCall[engine_pb2.SessionResponse], Protocol):
    """A session's context."""

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn: ...


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """Sessions of routers; commands go to ``loop``, updates come back through ``sessions``."""

    def __init__(
        self, identity: engine_pb2.ReplicaIdentity, card: engine_pb2.ModelCard, tokenizer_files: Mapping[str, bytes],
        loop: EngineLoop, sessions: Sessions, progress: RankProgress, clock: Clock,
    ) -> None:  # fmt: skip
        self._identity, self._card, self._files = identity, card, tokenizer_files
        self._loop, self._sessions, self._progress, self._clock = loop, sessions, progress, clock
        self._log = get_logger(component="leader")

    async def Describe(  # noqa: N802
        self, request: engine_pb2.DescribeRequest, context: Context
    ) -> engine_pb2.DescribeResponse:
        del context
        files = self._files if request.include_tokenizer else {}
        return engine_pb2.DescribeResponse(
            identity=self._identity,
            card=self._card,
            tokenizer_files=[engine_pb2.TokenizerFile(name=n, content=c) for n, c in files.items()],
        )

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[engine_pb2.SessionRequest], context: SessionCall
    ) -> None:
        hello = await self._shake_hands(request_iterator, context)
        session, outbox = self._sessions.open(
            block_events=hello.block_events,
            pause_s=hello.block_events_pause_s,
            load_pause_s=hello.load_pause_s if hello.HasField("load_pause_s") else None,
        )
        log = self._log.bind(session=session, router=hello.router_id)
        log.info("session_opened")
        reader = asyncio.create_task(self._read(session, outbox, request_iterator))
        overflow = asyncio.create_task(outbox.overflow.wait())
        SessionWriter(outbox, context, self._beat).begin(engine_pb2.Welcome(identity=self._identity))
        outbox.tell_blocks(asyncio.get_running_loop().time())
        beats = asyncio.create_task(_ask_for_beats(outbox))
        try:
            await asyncio.wait({reader, overflow}, return_when=asyncio.FIRST_COMPLETED)
            if outbox.overflow.is_set():
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "This session does not read; it was reset.")
        finally:
            for task in (reader, overflow, beats):
                task.cancel()
            self._sessions.close(session)
            self._loop.post(CancelSession(session))
            log.info("session_closed", overflowed=outbox.overflow.is_set())

    async def _shake_hands(
        self, requests: AsyncIterator[engine_pb2.SessionRequest], context: SessionCall
    ) -> engine_pb2.Hello:
        try:
            async with asyncio.timeout(_HELLO_DEADLINE_S):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "A session begins with a Hello.")
        if first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "A session begins with a Hello.")
        if first.hello.expected != self._identity:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"This is {_name(self._identity)}, not {_name(first.hello.expected)}.",
            )
        return first.hello

    def _beat(self) -> engine_pb2.Beat:
        progress = self._progress
        return engine_pb2.Beat(
            step=progress.step, step_age_s=progress.step_age_s(), load=load_to_message(self._loop.load)
        )

    async def _read(self, session: int, outbox: Outbox, requests: AsyncIterator[engine_pb2.SessionRequest]) -> None:
        async for request in requests:
            for cancel in request.commands.cancels:
                self._loop.post(Cancel(SequenceKey(session, cancel.sequence_id)))
            refused = [end for submit in request.commands.submits if (end := self._submit(session, submit)) is not None]
            if refused:
                outbox.refuse(self._progress.step, refused, self._loop.load)
            if request.commands.submits:
                self._sessions.load_changed(self._progress.step, self._loop.load, but=(session,))
            if request.HasField("resync_blocks"):
                outbox.resync_blocks()
            if request.HasField("pauses"):
                outbox.pace(request.pauses.block_events_s, request.pauses.load_s)

    def _submit(self, session: int, submit: engine_pb2.Submit) -> SequenceProgress | None:
        """Hands a sequence to the loop; or why it never gets there."""
        key = SequenceKey(session, submit.sequence_id)
        try:
            sequence = self._sequence(key, submit)
        except AssertionError as error:
            # A router that does not check its bounds costs its own request, not the session.
            detail = f"The sampling parameters are out of their bounds: {error}."
            return SequenceProgress(key, submit.attempt, end=SequenceEnd.REJECTED_INVALID, detail=detail)
        return None if self._loop.post(Submit(sequence)) else refused_for_capacity(key, submit.attempt)

    def _sequence(self, key: SequenceKey, submit: engine_pb2.Submit) -> Sequence:
        deadline_s = self._clock.now() + submit.deadline_s if submit.HasField("deadline_s") else None
        return Sequence(
            key=key,
            attempt=submit.attempt,
            prompt_token_ids=list(submit.prompt_token_ids),
            generated_token_ids=list(submit.generated_token_ids),
            params=sampling_from_message(submit.sampling, submit.logprobs),
            priority=submit.priority,
            deadline_s=deadline_s,
            request_id=submit.request_id,
            cache_salt=submit.cache_salt.encode(),
        )


async def _ask_for_beats(outbox: Outbox) -> None:
    while True:
        outbox.ask_for_beat()
        await asyncio.sleep(BEAT_S)


def _name(identity: engine_pb2.ReplicaIdentity) -> str:
    return f"{identity.model}/{identity.slot}#{identity.generation} ({identity.checkpoint_digest[:12]})"


class LeaderServer:
    """Runs the Engine service in a thread with its own event loop; ``publish`` may be called from any thread.

    ``block_events``: routers may hear which blocks the prefix cache holds.
    """

    def __init__(self, host: str, first_port: int, *, block_events: bool = False) -> None:
        self._host, self._first_port = host, first_port
        self._sessions = Sessions(BlockLog() if block_events else None)
        self._events = uvloop.new_event_loop()
        self._bound = threading.Event()
        self._failure: BaseException | None = None
        self.port = 0

    @property
    def sessions(self) -> Sessions:
        return self._sessions

    def publish(self, published: Published) -> None:
        # A step that ends while the process stops has no listener left.
        with contextlib.suppress(RuntimeError):
            self._events.call_soon_threadsafe(self._sessions.deliver, published)

    def start(self, servicer: EngineServicer) -> int:
        """Binds the first free port from ``first_port`` on and returns it; raises what binding raised."""
        thread = threading.Thread(target=self._run, args=(servicer,), name="engine-grpc", daemon=True)
        thread.start()
        if not self._bound.wait(_START_DEADLINE_S):
            raise EngineFailed(f"The Engine service did not start within {_START_DEADLINE_S:.0f} s.", retryable=True)
        if self._failure is not None:
            raise self._failure
        return self.port

    def _run(self, servicer: EngineServicer) -> None:
        asyncio.set_event_loop(self._events)
        self._events.run_until_complete(self._serve(servicer))

    async def _serve(self, servicer: EngineServicer) -> None:
        server = Http2Server()
        engine_pb2_grpc.add_EngineServicer_to_server(servicer, server)
        try:
            self.port = bind(server, self._host, self._first_port, scan=True)
            await server.start()
        except BaseException as error:  # boundary: start() raises it in the caller's thread
            self._failure = error
            return
        finally:
            self._bound.set()
        await server.wait_for_termination()
