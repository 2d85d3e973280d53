"""Adapter: one replica incarnation, met through its Engine service.

A session keeps one multiplexed stream open for as long as the endpoint is in the table. A stream that breaks or
falls silent fails every sequence on it at once and is opened again, with a bounded backoff.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc
import grpc.aio

from cluster.domain.endpoint import Endpoint
from cluster.domain.errors import CheckpointError
from cluster.router.cancellation import being_cancelled
from cluster.router.command_writer import CommandWriter
from cluster.router.endpoint_table import Candidate, LiveLoad
from cluster.router.fleet_health import FleetHealth
from cluster.router.handshake import HandshakeRefused, check_welcome, describe
from cluster.router.prefix_index import MAX_BLOCKS, PrefixIndex
from cluster.router.sequence_stream import LossReason, SequenceLost, SequenceStream
from cluster.router.tokenization import Tokenizer
from cluster.router.tokenizer_cache import TokenizerCache
from cluster.telemetry.logs import Logger
from cluster.v1 import engine_pb2, engine_pb2_grpc
from cluster.wire import convert
from cluster.wire.http2.client import Http2Channel
from cluster.wire.http2.client_call import ClientCall

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
SILENCE_CHECKS = 8  # per engine_silence_s
DESCRIBE_TIMEOUT_S = 30.0
SESSION_METHOD = f"/{engine_pb2.DESCRIPTOR.services_by_name['Engine'].full_name}/Session"
_GENERATED = (engine_pb2.SEQUENCE_END_STOP, engine_pb2.SEQUENCE_END_LENGTH)  # ends of what is whole
_Call: TypeAlias = ClientCall[engine_pb2.SessionRequest, engine_pb2.SessionResponse]


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What all sessions of a router share."""

    router_id: str
    engine_silence_s: float
    engine_step_deadline_s: float
    tokenizers: TokenizerCache
    health: FleetHealth = field(default_factory=FleetHealth)
    max_index_blocks: int = MAX_BLOCKS
    index_changed: Callable[[str, PrefixIndex], None] = lambda _model, _index: None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a replica serves; ``tokenizer`` is None when its checkpoint has none."""

    card: engine_pb2.ModelCard
    tokenizer: Tokenizer | None


class EngineSession:
    """The router's side of Engine.Session for one endpoint.

    ``on_change`` is called whenever ``up`` changed, ``on_load`` whenever ``load`` may have become less;
    ``places_elsewhere`` is asked before so many sequences leave an engine that is much slower than its peers: how many
    of them its peers would begin soon. ``submit`` and
    ``release`` never wait: they are gathered and leave once per turn of the event loop, in one Commands message unless
    they are large. Which blocks the endpoint holds goes to ``index``, if there is one. ``pauses``: those
    of its news, until ``pace`` tells others.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: SessionSettings,
        on_change: Callable[[], None],
        log: Logger,
        index: PrefixIndex | None = None,
        on_load: Callable[[EngineSession], None] = lambda _: None,
        places_elsewhere: Callable[[EngineSession, int], int] = lambda _session, _wanted: 0,
        pauses: engine_pb2.Pauses | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.replica_name = str(endpoint.incarnation.replica)
        self.up = False
        self.load = LiveLoad(endpoint.block_size)
        self.served: ServedModel | None = None
        self._settings = settings
        self._on_change = on_change
        self._on_load = on_load
        self._places_elsewhere = places_elsewhere
        self._pulse = settings.health.pulse(endpoint.incarnation)
        self._log = log.bind(replica=str(endpoint.incarnation), address=endpoint.address)
        self._sequences: dict[int, SequenceStream] = {}
        self._places: dict[int, int] = {}  # tokens of those that the engine still works on, or is about to
        self._next_id = 1
        self._commands = CommandWriter()
        self._index = index
        self._pauses = pauses or engine_pb2.Pauses()
        self._heard = False
        self._stuck = False  # its step ran too long: it is down until it says that it works again
        self._closed = False
        self._task = asyncio.get_running_loop().create_task(self._keep_open(), name=f"session {endpoint.incarnation}")

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.endpoint, self.up, self.load.tokens)

    @property
    def open_sequences(self) -> int:
        return len(self._sequences)

    def submit(
        self, submit: engine_pb2.Submit, tokens: int, updates_max: int, cached_tokens: int = 0
    ) -> tuple[int, SequenceStream]:
        """Sends ``submit`` under an id of its own. SequenceLost when the session is down or its outbox full.

        Of its ``tokens``, ``cached_tokens`` are thought to be cached there.
        """
        if not self.up:
            raise SequenceLost(LossReason.BROKEN)
        if self._commands.full:
            raise SequenceLost(LossReason.OVERFLOW)
        sequence_id, self._next_id = self._next_id, self._next_id + 1
        submit.sequence_id = sequence_id
        stream = SequenceStream(updates_max, submit.attempt)
        self._sequences[sequence_id], self._places[sequence_id] = stream, tokens
        self._commands.submit(submit)
        self.load.sent(tokens, cached_tokens)
        self._pulse.submitted(submit.attempt)
        return sequence_id, stream

    def release(self, sequence_id: int) -> None:
        """The request is done with this sequence; the engine is told unless it ended by itself."""
        stream = self._sequences.pop(sequence_id, None)
        if stream is None:
            return
        if self._give_back(sequence_id):
            self._on_load(self)
        if not self._commands.take_back(sequence_id) and self.up and not stream.ended:
            self._commands.cancel(sequence_id)

    def _give_back(self, sequence_id: int) -> bool:
        """The engine is done with it, whoever still reads what it said: nobody waits for a client that does not."""
        tokens = self._places.pop(sequence_id, None)
        if tokens is None:
            return False
        self.load.ended(tokens)
        return True

    def pace(self, pauses: engine_pb2.Pauses) -> None:
        """Makes the engine send its news with other pauses from now on."""
        self._pauses = pauses
        self._commands.say("pauses", engine_pb2.SessionRequest(pauses=pauses))

    def forget_blocks(self) -> None:
        """The endpoint leaves the table: what it holds interests nobody any more, nor what it may still say."""
        index, self._index = self._index, None
        if index is not None:
            index.forget(self.endpoint.incarnation)

    async def close(self, reason: LossReason = LossReason.REMOVED) -> None:
        """Ends the session; its sequences are lost for ``reason``."""
        self.up, self._closed = False, True
        self._pulse.closed(len(self._places))
        self._fail_sequences(reason)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _keep_open(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        while not being_cancelled():
            reason = LossReason.BROKEN
            try:
                async with Http2Channel(self.endpoint.address) as opened:
                    await self._run(opened)
            except SequenceLost as lost:
                reason = lost.reason
            except (HandshakeRefused, CheckpointError, TimeoutError, grpc.RpcError) as error:
                self._log.warning("session_failed", error=_brief(error))
            except Exception:  # boundary: whatever an engine says, its endpoint must be tried again
                self._log.exception("session_failed")
            backoff_s = BACKOFF_FIRST_S if self.up else min(2 * backoff_s, BACKOFF_MAX_S)
            self._went_down(reason)
            if not being_cancelled():
                await asyncio.sleep(backoff_s)

    async def _run(self, opened: Http2Channel) -> None:
        """One stream, from its handshake to its end; always raises."""
        call: _Call | None = None
        watching: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(self._settings.engine_silence_s):
                call = await opened.stream(
                    SESSION_METHOD,
                    engine_pb2.SessionRequest.SerializeToString,
                    engine_pb2.SessionResponse.FromString,
                )
                if self._index is not None:
                    self._index.interrupted(self.endpoint.incarnation)
                self._commands.forget_asides()
                hello = engine_pb2.Hello(
                    router_id=self._settings.router_id,
                    expected=convert.identity_of(self.endpoint),
                    block_events=self._index is not None,
                    block_events_pause_s=self._pauses.block_events_s,
                    load_pause_s=self._pauses.load_s,
                )
                await call.write(engine_pb2.SessionRequest(hello=hello))
                check_welcome(await call.read(), self.endpoint)
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                card, tokenizer = await describe(
                    engine_pb2_grpc.EngineStub(opened), self.endpoint, self._settings.tokenizers
                )
                self.served, self.load.max_num_seqs = ServedModel(card, tokenizer), card.max_num_seqs
            silent = asyncio.Event()
            watching = asyncio.create_task(self._watch_silence(call, silent))
            self._commands.begin(call)
            if not self._stuck:
                self._came_up()
            await self._read(call)
            raise SequenceLost(LossReason.SILENT if silent.is_set() else LossReason.BROKEN)
        finally:
            self._commands.end()
            if call is not None:
                call.cancel()
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching])

    async def _read(self, call: _Call) -> None:
        """Dispatches whatever comes, in the turn of the event loop that brings it, until the stream ends."""
        try:
            await call.each(self._hear)
        except grpc.RpcError as error:
            self._log.debug("session_ended", error=_brief(error))

    def _hear(self, message: engine_pb2.SessionResponse) -> None:
        self._heard = True
        if not self._closed:  # as the stream may not know yet: what comes up now would be up for ever
            self._dispatch(message)

    def _dispatch(self, message: engine_pb2.SessionResponse) -> None:
        """SequenceLost STUCK when the engine's step has run too long."""
        kind = message.WhichOneof("message")
        if kind == "step":
            freed = False
            for update in message.step.sequences:
                stream = self._sequences.get(update.sequence_id)
                if stream is not None:
                    stream.deliver(update)
                    if update.end in _GENERATED:  # whoever was refused is to go elsewhere before others come here
                        freed |= self._give_back(update.sequence_id)
            if message.step.HasField("load"):
                self.load.reported(convert.load_from_message(message.step.load))
                freed = True
            if freed:
                self._on_load(self)
            self._feel(message.step)
        elif kind == "beat":
            if message.beat.HasField("load"):
                self.load.reported(convert.load_from_message(message.beat.load))
                self._on_load(self)
            self._pulse.beat(message.beat.step_age_s)
            self._judge(message.beat.step_age_s)
        elif kind == "blocks" and self._index is not None:
            self._hear_blocks(self._index, message.blocks)

    def _feel(self, step: engine_pb2.StepUpdate) -> None:
        """Tells the pulse, once the load is that after the step."""
        load = self.load.snapshot
        if any(map(_delivers, step.sequences)):  # mostly the first one does
            self._pulse.stepped(step.step, load)
            if self._pulse.slow:
                self._relieve()
        elif not load.running_sequences:
            self._pulse.idle()

    def _relieve(self) -> None:
        """The engine is slow: sends some of its youngest sequences elsewhere, where that is worth a prefill."""
        going_on = [stream for stream in self._sequences.values() if stream.going_on]
        wanted = self._pulse.leaving(len(going_on))
        leaving = self._places_elsewhere(self, wanted) if wanted else 0
        if leaving:
            self._pulse.moved(leaving)
            for stream in going_on[-leaving:]:
                stream.fail(SequenceLost(LossReason.SLOW))

    def _hear_blocks(self, index: PrefixIndex, events: engine_pb2.BlockEvents) -> None:
        if not index.apply(self.endpoint.incarnation, events):
            self._log.warning("block_events_missed", sequence_number=events.sequence_number)
            self._commands.say("resync", engine_pb2.SessionRequest(resync_blocks=engine_pb2.ResyncBlocks()))
        self._settings.index_changed(self.endpoint.model, index)

    def _judge(self, step_age_s: float) -> None:
        if step_age_s <= self._settings.engine_step_deadline_s:
            if self._stuck:
                self._stuck = False
                self._came_up()
        elif not self._stuck:
            self._stuck = True
            raise SequenceLost(LossReason.STUCK)

    async def _watch_silence(self, call: _Call, silent: asyncio.Event) -> None:
        """Cancels the call at most ``engine_silence_s`` after the last message, and not much earlier.

        Time is counted in short waits, each for its nominal length: while this process itself stands still,
        silence proves nothing about the engine. The last message may have come at the beginning of a wait that
        counts as one with a message, so there is one wait more than those that count as missed.
        """
        interval_s = self._settings.engine_silence_s / (SILENCE_CHECKS + 1)
        missed = 0
        while missed < SILENCE_CHECKS:
            self._heard = False
            await asyncio.sleep(interval_s)
            missed = 0 if self._heard else missed + 1
        silent.set()
        call.cancel()

    def _came_up(self) -> None:
        self.up = True
        self._pulse.came_up()
        self._log.info("session_up")
        self._on_change()

    def _went_down(self, reason: LossReason) -> None:
        was_up, self.up = self.up, False
        self._commands.forget_commands()
        if was_up:
            self._pulse.went_down(reason, len(self._places))
        self._fail_sequences(reason)
        if was_up:
            self._log.warning("session_down", reason=reason.value)
            self._on_change()

    def _fail_sequences(self, reason: LossReason) -> None:
        for stream in self._sequences.values():
            stream.fail(SequenceLost(reason))
        for sequence_id in tuple(self._places):
            self._give_back(sequence_id)


def _delivers(update: engine_pb2.SequenceUpdate) -> bool:
    """Whether the engine has computed something for the sequence: a refusal is no sign of health, nor of speed."""
    return bool(update.token_ids) or update.end in _GENERATED


def _brief(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"
