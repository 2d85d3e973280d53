"""A replica without a model: the real Engine service on a loopback port, whose next token is a pure function."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from cluster.domain.block_hash import block_hashes, short_name
from cluster.domain.endpoint import Endpoint
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.engine.block_events import BlockLog, BlockReader
from cluster.v1 import engine_pb2, engine_pb2_grpc, inference_pb2
from cluster.wire import channel
from cluster.wire.http2.server import Http2Server

BLOCK_SIZE = 16
DIGEST = "sha256:weights"
# (prompt, generated so far, seed) -> the next token
NextToken = Callable[[Sequence[int], Sequence[int], int], int]
# (submit, generated so far) -> the next token, for tests whose tokens depend on all of the sampling
Draw = Callable[[engine_pb2.Submit, Sequence[int]], int]


def hashed_token(vocab_size: int) -> NextToken:
    """A token that depends on every token before it, and on the seed."""

    def next_token(prompt: Sequence[int], generated: Sequence[int], seed: int) -> int:
        text = f"{list(prompt)}{list(generated)}{seed}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % vocab_size

    return next_token


def scripted_token(script: Sequence[int]) -> NextToken:
    """The tokens of ``script`` in order, whatever the prompt; then the last one for ever."""
    return lambda prompt, generated, seed: script[min(len(generated), len(script) - 1)]


def expected_tokens(next_token: NextToken, prompt: Sequence[int], seed: int, count: int) -> list[int]:
    generated: list[int] = []
    for _ in range(count):
        generated.append(next_token(prompt, generated, seed))
    return generated


@dataclass
class _Sequence:
    submit: engine_pb2.Submit
    generated: list[int]
    sent: int = 0
    cached_tokens: int = 0


@dataclass
class FakeEngine:
    """Told what to do through its attributes, at any time.

    ``die_after``: the process "dies" once a sequence got so many tokens in one attempt; ``break_after``: only the
    session breaks, and may be opened again. ``dies_of``: "dies" of any prompt with this token. ``reject``: answers every
    submit with this end. ``silent``: says nothing any more, like a stopped process. ``step_s``: pause between steps.
    ``step_age_s``: a step "runs" since then; while it is not 0 there are beats only. ``draw`` replaces ``next_token``.
    ``max_num_seqs``: sequences of a step, the others wait in order of arrival; 0: any number, and routers are not told.
    ``tell_blocks``: has a prefix cache of every prompt it began, without a bound, and tells routers that ask. With
    ``lose_block_message`` the next such message never arrives.
    """

    next_token: NextToken
    model: str = "demo"
    slot: int = 0
    generation: int = 1
    digest: str = DIGEST
    vocab_size: int = 1000
    max_model_len: int = 256
    end_token_ids: tuple[int, ...] = ()
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)
    default_sampling: inference_pb2.Sampling = field(default_factory=inference_pb2.Sampling)
    step_s: float = 0.0
    start_delay_s: float = 0.0
    beat_s: float = 0.05
    step_age_s: float = 0.0
    draw: Draw | None = None
    tokens_per_step: int = 1
    die_after: int | None = None
    break_after: int | None = None
    dies_of: int | None = None
    reject: engine_pb2.SequenceEnd = engine_pb2.SEQUENCE_END_UNSPECIFIED
    max_num_seqs: int = 0
    silent: bool = False
    echo_old_attempts: bool = False
    claimed_generation: int | None = None
    tell_blocks: bool = False
    lose_block_message: bool = False
    resyncs: int = 0
    pauses: list[tuple[float, float]] = field(default_factory=list)  # of news of blocks and loads, as it was asked for
    blocks: BlockLog = field(default_factory=BlockLog)
    _work: asyncio.Event = field(default_factory=asyncio.Event)
    submits: list[engine_pb2.Submit] = field(default_factory=list)
    submitted_s: list[float] = field(default_factory=list)  # when each came, by the event loop's clock
    submitters: set[int] = field(default_factory=set)  # sessions
    commands: int = 0
    cancels: list[int] = field(default_factory=list)
    running: dict[tuple[int, int], _Sequence] = field(default_factory=dict)
    sessions: int = 0
    port: int = 0

    async def start(self) -> FakeEngine:
        self.dead = asyncio.Event()
        self._server = Http2Server()
        engine_pb2_grpc.add_EngineServicer_to_server(_Servicer(self), self._server)
        self.port = channel.bind(self._server, "127.0.0.1", self.port)
        await self._server.start()
        return self

    async def stop(self) -> None:
        self.dead.set()
        self._work.set()
        server, self._server = self._server, None
        if server is not None:  # a server must be gone before its event loop: it knows us, and must not be kept by us
            await server.stop(0)

    def hold(self, token_ids: Sequence[int], salt: str = "") -> int:
        """The full blocks of these tokens are cached from now on; how many tokens need not be computed."""
        names = block_hashes(token_ids, BLOCK_SIZE, salt.encode())
        held = set(self.blocks.names())
        known = [short_name(name) in held for name in names]
        self.blocks.append(dict.fromkeys(names, True))
        self._work.set()
        hits = known.index(False) if False in known else len(known)
        return BLOCK_SIZE * min(hits, (len(token_ids) - 1) // BLOCK_SIZE)

    def evict(self, token_ids: Sequence[int], keep: int = 0, salt: str = "") -> None:
        """Forgets the blocks of these tokens behind the first ``keep``."""
        self.blocks.append(dict.fromkeys(block_hashes(token_ids, BLOCK_SIZE, salt.encode())[keep:], False))
        self._work.set()

    @property
    def endpoint(self) -> Endpoint:
        incarnation = Incarnation(ReplicaId(self.model, self.slot), self.generation)
        return Endpoint(incarnation, f"127.0.0.1:{self.port}", self.digest, BLOCK_SIZE)

    @property
    def identity(self) -> engine_pb2.ReplicaIdentity:
        return engine_pb2.ReplicaIdentity(
            model=self.model,
            slot=self.slot,
            generation=self.claimed_generation or self.generation,
            checkpoint_digest=self.digest,
            block_size=BLOCK_SIZE,
        )

    @property
    def card(self) -> engine_pb2.ModelCard:
        content = b"".join(self.tokenizer_files.values())
        return engine_pb2.ModelCard(
            name=self.model,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            checkpoint_digest=self.digest,
            tokenizer_digest=hashlib.sha256(content).hexdigest() if content else "",
            end_token_ids=self.end_token_ids,
            default_sampling=self.default_sampling,
            max_num_seqs=self.max_num_seqs,
        )

    @property
    def load(self) -> engine_pb2.Load:
        """Told only with ``max_num_seqs``."""
        if not self.max_num_seqs:
            return engine_pb2.Load()
        running = min(len(self.running), self.max_num_seqs)
        return engine_pb2.Load(running_sequences=running, waiting_sequences=len(self.running) - running)

    def stepping(self, session: int) -> list[_Sequence]:
        """Those of ``session`` that the next step holds."""
        first = itertools.islice(self.running.items(), self.max_num_seqs or None)
        return [sequence for (owner, _), sequence in first if owner == session]


class _Servicer(engine_pb2_grpc.EngineServicer):
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    async def Describe(self, request: engine_pb2.DescribeRequest, context: Any) -> engine_pb2.DescribeResponse:
        engine = self._engine
        files = engine.tokenizer_files.items() if request.include_tokenizer else ()
        return engine_pb2.DescribeResponse(
            identity=engine.identity,
            card=engine.card,
            tokenizer_files=[engine_pb2.TokenizerFile(name=n, content=c) for n, c in files],
        )

    async def Session(self, requests: Any, context: grpc.aio.ServicerContext) -> None:
        engine = self._engine
        if engine.dead.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "dead")
        first = await context.read()
        assert first.HasField("hello")
        if engine.silent:
            await engine.dead.wait()
        if first.hello.expected != engine.identity:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another replica lives here")
        await context.write(engine_pb2.SessionResponse(welcome=engine_pb2.Welcome(identity=engine.identity)))
        engine.sessions += 1
        session = engine.sessions
        engine.pauses = [(first.hello.block_events_pause_s, first.hello.load_pause_s)]
        blocks = engine.blocks.open() if engine.tell_blocks and first.hello.block_events else None
        reader = asyncio.create_task(self._read(session, context, blocks))
        try:
            await self._steps(session, context, blocks)
        finally:
            if blocks is not None:
                blocks.close()
            reader.cancel()
            # Before anything is awaited: a session that is cancelled twice gets no further than that.
            for key in [k for k in engine.running if k[0] == session]:
                del engine.running[key]
            await asyncio.wait([reader])
        await context.abort(grpc.StatusCode.UNAVAILABLE, "dead")

    async def _read(self, session: int, context: Any, blocks: BlockReader | None) -> None:
        engine = self._engine
        while True:
            message = await context.read()
            if message is grpc.aio.EOF:
                return
            if message.HasField("resync_blocks"):
                engine.resyncs += 1
                assert blocks is not None, "a router that never asked for blocks misses some"
                blocks.restart()
            if message.HasField("pauses"):
                engine.pauses.append((message.pauses.block_events_s, message.pauses.load_s))
            engine.commands += message.HasField("commands")
            for submit in message.commands.submits:
                engine.submits.append(submit)
                engine.submitted_s.append(asyncio.get_running_loop().time())
                engine.submitters.add(session)
                sequence = _Sequence(submit, list(submit.generated_token_ids))
                if engine.tell_blocks:
                    sequence.cached_tokens = engine.hold(submit.prompt_token_ids, submit.cache_salt)
                engine.running[session, submit.sequence_id] = sequence
            for cancel in message.commands.cancels:
                engine.cancels.append(cancel.sequence_id)
                engine.running.pop((session, cancel.sequence_id), None)
            engine._work.set()

    async def _tell_blocks(self, context: Any, blocks: BlockReader) -> bool:
        """One message, as the engine tells them: tokens come between. False: there is nothing to tell."""
        if self._engine.silent or (events := blocks.next()) is None:
            return False
        if self._engine.lose_block_message:
            self._engine.lose_block_message = False
        else:
            await context.write(engine_pb2.SessionResponse(blocks=events))
        return True

    async def _steps(self, session: int, context: Any, blocks: BlockReader | None) -> None:
        engine = self._engine
        step = 0
        while not engine.dead.is_set():
            told = blocks is not None and await self._tell_blocks(context, blocks)
            mine = engine.stepping(session)
            if engine.silent or engine.step_age_s or not mine:
                if told:
                    continue
                engine._work.clear()
                try:
                    async with asyncio.timeout(engine.beat_s):  # in this task, unlike wait_for
                        await engine._work.wait()
                except TimeoutError:
                    if not engine.silent:
                        beat = engine_pb2.Beat(step=step, step_age_s=engine.step_age_s, load=engine.load)
                        await context.write(engine_pb2.SessionResponse(beat=beat))
                continue
            if engine.break_after is not None and any(s.sent >= engine.break_after for s in mine):
                return
            if any(engine.dies_of in s.submit.prompt_token_ids for s in mine):
                engine.dead.set()
                return
            if engine.start_delay_s and any(s.sent == 0 for s in mine):
                await asyncio.sleep(engine.start_delay_s)
            step += 1
            updates = [self._advance(session, sequence) for sequence in mine]
            update = engine_pb2.StepUpdate(step=step, sequences=updates, load=engine.load)
            await context.write(engine_pb2.SessionResponse(step=update))
            if engine.die_after is not None and any(s.sent >= engine.die_after for s in mine):
                engine.dead.set()
            await asyncio.sleep(engine.step_s)

    def _advance(self, session: int, sequence: _Sequence) -> engine_pb2.SequenceUpdate:
        engine, submit = self._engine, sequence.submit
        update = engine_pb2.SequenceUpdate(sequence_id=submit.sequence_id, attempt=submit.attempt)
        if not sequence.sent:
            update.cached_prompt_tokens = sequence.cached_tokens
        if engine.echo_old_attempts:
            update.attempt = submit.attempt + 7
        if engine.reject:
            update.end = engine.reject
        else:
            for _ in range(engine.tokens_per_step):
                if engine.draw is not None:
                    token = engine.draw(submit, sequence.generated)
                else:
                    token = engine.next_token(submit.prompt_token_ids, sequence.generated, submit.sampling.seed)
                if token in submit.sampling.stop_token_ids:
                    update.end = engine_pb2.SEQUENCE_END_STOP
                    break
                sequence.generated.append(token)
                sequence.sent += 1
                update.token_ids.append(token)
                if submit.logprobs:
                    update.logprobs.append(
                        inference_pb2.TokenLogprobs(token_id=token, logprob=-len(sequence.generated))
                    )
                if len(sequence.generated) >= submit.sampling.max_tokens:
                    update.end = engine_pb2.SEQUENCE_END_LENGTH
                    break
        if update.end:
            engine.running.pop((session, submit.sequence_id), None)
        return update
