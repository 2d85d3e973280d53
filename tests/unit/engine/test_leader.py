"""The Engine service without a network: sessions that do not read, submits out of bounds, cards."""

import asyncio
import os

import grpc
import pytest

from cluster.domain.block_hash import short_name
from cluster.domain.clock import MonotonicClock
from cluster.domain.endpoint import LoadSnapshot
from cluster.engine import block_events
from cluster.engine import sessions as sessions_module
from cluster.engine.block_events import BlockLog
from cluster.engine.leader import EngineServicer
from cluster.engine.loop import CancelSession, Published, Submit
from cluster.engine.model.tensor_parallel import TensorParallelGroup, _configure_environment
from cluster.engine.model_card import default_sampling, tokenizer_digest
from cluster.engine.progress import RankProgress
from cluster.engine.session_writer import SessionWriter
from cluster.engine.sessions import Sessions
from cluster.engine.step import SequenceKey, SequenceProgress
from cluster.v1 import engine_pb2, inference_pb2

IDENTITY = engine_pb2.ReplicaIdentity(model="tiny", slot=1, generation=4, checkpoint_digest="abc", block_size=4)


class AbortedError(Exception):
    pass


class FakeContext:
    """A client that reads ``reads`` messages and then no more."""

    def __init__(self, reads):
        self.reads, self.written, self.code = reads, [], None
        self.on_room = None

    @property
    def writable(self):
        return len(self.written) < self.reads

    def push(self, message):
        assert self.writable
        self.written.append(engine_pb2.SessionResponse.FromString(message.SerializeToString()))

    def read_on(self, reads):
        self.reads += reads
        self.on_room()

    async def abort(self, code, details):
        self.code = code
        raise AbortedError(details)


class FakeLoop:
    def __init__(self):
        self.posted, self.load = [], LoadSnapshot()

    def post(self, command):
        self.posted.append(command)
        return True


async def requests(*messages):
    for message in messages:
        yield message
    await asyncio.Event().wait()


def hello(identity=IDENTITY):
    return engine_pb2.SessionRequest(hello=engine_pb2.Hello(router_id="r", expected=identity))


def submits(*values):
    return engine_pb2.SessionRequest(commands=engine_pb2.Commands(submits=values))


@pytest.fixture
def engine():
    clock, loop, sessions = MonotonicClock(), FakeLoop(), Sessions()
    servicer = EngineServicer(
        IDENTITY, engine_pb2.ModelCard(name="tiny"), {}, loop, sessions, RankProgress(clock), clock
    )
    return servicer, loop, sessions


async def until(condition):
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0)


async def test_a_session_that_stops_reading_is_reset_while_its_write_hangs(engine, monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_PENDING_BYTES", 1000)
    servicer, loop, sessions = engine
    context = FakeContext(reads=1)
    call = asyncio.create_task(servicer.Session(requests(hello()), context))
    await until(lambda: context.written)
    news = tuple(SequenceProgress(SequenceKey(1, number), 1, (5,)) for number in range(100))
    sessions.deliver(Published(1, news, servicer._progress.load))
    with pytest.raises(AbortedError, match="does not read"):
        await asyncio.wait_for(call, 2)
    assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert loop.posted[-1] == CancelSession(1)


def blocks_of(context):
    return [m.blocks for m in context.written if m.HasField("blocks")]


async def test_blocks_are_told_to_who_asked_after_the_tokens_and_again_when_some_were_missed(engine, monkeypatch):
    monkeypatch.setattr(sessions_module, "TELL_BLOCKS_S", 0.0)
    _, loop, _ = engine
    clock, sessions = MonotonicClock(), Sessions(BlockLog())
    servicer = EngineServicer(IDENTITY, engine_pb2.ModelCard(), {}, loop, sessions, RankProgress(clock), clock)
    load = servicer._progress.load
    commands = asyncio.Queue()

    async def from_router():
        while True:
            yield await commands.get()

    asking = engine_pb2.SessionRequest(hello=engine_pb2.Hello(expected=IDENTITY, block_events=True))
    await commands.put(asking)
    hearing, deaf = FakeContext(reads=100), FakeContext(reads=100)
    calls = [
        asyncio.create_task(servicer.Session(from_router(), hearing)),
        asyncio.create_task(servicer.Session(requests(hello()), deaf)),
    ]
    await until(lambda: blocks_of(hearing))
    assert (blocks_of(hearing)[0].reset, blocks_of(hearing)[0].complete) == (True, True)
    first, second = bytes([1]) * 32, bytes([2]) * 32
    news = (SequenceProgress(SequenceKey(1, 7), 1, (5,)), SequenceProgress(SequenceKey(2, 7), 1, (5,)))
    sessions.deliver(Published(1, news, load, {first: True}))
    sessions.deliver(Published(2, news, load, {second: True}))
    await until(lambda: len(blocks_of(hearing)) == 2)
    assert list(blocks_of(hearing)[1].stored) == [short_name(first), short_name(second)], "two steps, one message"
    kinds = [m.WhichOneof("message") for m in hearing.written if not m.HasField("beat")]
    assert kinds == ["welcome", "blocks", "step", "step", "blocks"]
    await commands.put(engine_pb2.SessionRequest(resync_blocks=engine_pb2.ResyncBlocks()))
    await until(lambda: len(blocks_of(hearing)) == 3)
    again = blocks_of(hearing)[2]
    assert (again.sequence_number, again.reset, len(again.stored)) == (3, True, 2)
    assert not blocks_of(deaf)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert not sessions._blocks.has_readers


async def test_a_sequence_of_one_router_is_told_to_the_others_who_asked_at_once(engine):
    servicer, loop, _ = engine
    asking = engine_pb2.SessionRequest(hello=engine_pb2.Hello(expected=IDENTITY, load_pause_s=0.01))
    hearing, deaf, sending = (FakeContext(reads=100) for _ in range(3))
    commands = asyncio.Queue()

    async def from_router():
        while True:
            yield await commands.get()

    streams = [(requests(asking), hearing), (requests(hello()), deaf), (from_router(), sending)]
    await commands.put(asking)
    calls = [asyncio.create_task(servicer.Session(stream, context)) for stream, context in streams]
    await until(lambda: all(context.written for context in (hearing, deaf, sending)))
    loop.load = LoadSnapshot(waiting_sequences=1, queued_prompt_tokens=3)
    sampling = inference_pb2.Sampling(max_tokens=1)
    await commands.put(submits(engine_pb2.Submit(sequence_id=1, prompt_token_ids=[1, 2, 3], sampling=sampling)))
    await until(lambda: steps_of(hearing))
    assert [(step.load.queued_prompt_tokens, len(step.sequences)) for step in steps_of(hearing)] == [(3, 0)]
    assert not steps_of(deaf)
    assert not steps_of(sending), "who sent it knows"
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)


def steps_of(context):
    return [message.step for message in context.written if message.HasField("step")]


async def test_a_long_account_waits_for_tokens(engine, monkeypatch):
    """One message of it goes when nothing else waits; between two of them whatever has come goes first."""
    monkeypatch.setattr(block_events, "MAX_NAMES", 2)
    log = BlockLog()
    log.append({bytes([n]) * 32: True for n in range(20)})
    sessions = Sessions(log)
    number, outbox = sessions.open(block_events=True)
    context = FakeContext(reads=1)
    SessionWriter(outbox, context, engine_pb2.Beat).begin(engine_pb2.Welcome())
    outbox.tell_blocks(0.0)
    load = RankProgress(MonotonicClock()).load
    while len(context.written) < 10:
        sessions.deliver(Published(1, (SequenceProgress(SequenceKey(number, 1), 1, (5,)),), load))
        context.read_on(2)
    context.read_on(100)
    kinds = [message.WhichOneof("message") for message in context.written]
    assert kinds == ["welcome", *["step", "blocks"] * 5, *["blocks"] * 5], "tokens first, whenever there is room"


async def test_a_router_of_many_replicas_hears_less_often(monkeypatch):
    monkeypatch.setattr(sessions_module, "TELL_BLOCKS_S", 0.0)
    log = BlockLog()
    sessions = Sessions(log)
    eager, patient = (sessions.open(block_events=True, pause_s=pause_s)[1] for pause_s in (0.0, 0.02))
    heard = {eager: [], patient: []}
    load = RankProgress(MonotonicClock()).load

    def hear():
        for outbox, messages in heard.items():
            outbox.take()
            message = outbox.take_blocks()
            if message is not None:
                messages.append(message)

    for outbox in heard:
        outbox.tell_blocks(asyncio.get_running_loop().time())
    hear()
    for number in range(1, 6):
        sessions.deliver(Published(number, (), load, {bytes([number]) * 32: True}))
        await until(lambda n=number: (hear(), len(heard[eager]) == n + 1)[1])
    await until(lambda: (hear(), sum(len(m.stored) for m in heard[patient]) == 5)[1])
    assert len(heard[patient]) < len(heard[eager]), "all of it, in fewer messages"
    assert sessions._telling is None, "no timer runs while there is nothing to tell"


async def test_a_replica_without_a_prefix_cache_tells_of_no_blocks(engine):
    servicer, _, _ = engine
    context = FakeContext(reads=100)
    asking = engine_pb2.SessionRequest(hello=engine_pb2.Hello(expected=IDENTITY, block_events=True))
    resync = engine_pb2.SessionRequest(resync_blocks=engine_pb2.ResyncBlocks())
    call = asyncio.create_task(servicer.Session(requests(asking, resync), context))
    await until(lambda: any(m.HasField("beat") for m in context.written))
    assert not blocks_of(context)
    call.cancel()
    await asyncio.wait([call])


async def test_a_submit_out_of_bounds_costs_itself_only(engine):
    servicer, loop, _ = engine
    context = FakeContext(reads=100)
    good = engine_pb2.Submit(
        sequence_id=2, cache_salt="tenant", prompt_token_ids=[1], sampling=inference_pb2.Sampling(max_tokens=3)
    )
    bad = engine_pb2.Submit(sequence_id=1, prompt_token_ids=[1], sampling=inference_pb2.Sampling(max_tokens=0))
    call = asyncio.create_task(servicer.Session(requests(hello(), submits(bad, good)), context))
    await until(lambda: any(m.HasField("step") for m in context.written))
    update = next(m.step for m in context.written if m.HasField("step")).sequences[0]
    assert (update.sequence_id, update.end) == (1, engine_pb2.SEQUENCE_END_REJECTED_INVALID)
    assert [c.sequence.key.sequence_id for c in loop.posted if isinstance(c, Submit)] == [2]
    assert loop.posted[-1].sequence.cache_salt == b"tenant"
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_session_begins_with_a_hello_to_the_right_replica(engine):
    servicer, _, _ = engine
    context = FakeContext(reads=9)
    with pytest.raises(AbortedError, match="begins with a Hello"):
        await servicer.Session(requests(submits()), context)
    older = engine_pb2.ReplicaIdentity()
    older.CopyFrom(IDENTITY)
    older.generation = 3
    with pytest.raises(AbortedError, match=r"This is tiny/1#4 .*, not tiny/1#3"):
        await servicer.Session(requests(hello(older)), context)
    assert context.code == grpc.StatusCode.FAILED_PRECONDITION


def test_default_sampling_follows_generation_config():
    assert default_sampling({}) == inference_pb2.Sampling()
    greedy = default_sampling({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.5})
    assert greedy == inference_pb2.Sampling(repetition_penalty=1.5)
    sampled = default_sampling({"do_sample": True, "top_p": 0.5, "top_k": 7, "min_p": None})
    assert sampled == inference_pb2.Sampling(temperature=1.0, top_p=0.5, top_k=7)


def test_a_tokenizer_is_known_by_what_is_in_it():
    assert tokenizer_digest({}) == ""
    assert tokenizer_digest({"a": b"1", "b": b"2"}) == tokenizer_digest({"b": b"2", "a": b"1"})
    assert tokenizer_digest({"a": b"12", "b": b""}) != tokenizer_digest({"a": b"1", "b": b"2"})


@pytest.mark.parametrize(
    ("collective", "local_rank", "local_size"), [("nccl", "0", None), ("gloo", "1", None), ("shm", "1", "2")]
)
def test_what_the_communication_libraries_read(collective, local_rank, local_size, monkeypatch):
    for name in (
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "DS_ACCELERATOR",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    _configure_environment(TensorParallelGroup(1, 2, collective), "127.0.0.1", 1234)
    assert os.environ["LOCAL_RANK"] == local_rank, "a CUDA rank sees one device, number 0"
    assert os.environ.get("LOCAL_SIZE") == local_size, "the shared-memory kernel wants it, and only where it is correct"
    assert os.environ["MASTER_PORT"] == "1234"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ.get("DS_ACCELERATOR") == (None if collective == "nccl" else "cpu")


async def test_a_router_whose_fleet_has_grown_changes_the_pauses(engine):
    """Of both kinds of news, in the middle of a session; what waited for the old pause waits for the new one."""
    servicer, _, _ = engine
    log = BlockLog()
    log.append({bytes([1]) * 32: True})
    sessions = servicer._sessions = Sessions(log)
    asking = engine_pb2.Hello(expected=IDENTITY, block_events=True, block_events_pause_s=9.0, load_pause_s=9.0)
    context, commands = FakeContext(reads=100), asyncio.Queue()

    async def from_router():
        while True:
            yield await commands.get()

    await commands.put(engine_pb2.SessionRequest(hello=asking))
    call = asyncio.create_task(servicer.Session(from_router(), context))
    await until(lambda: sessions._outboxes)
    (outbox,) = sessions._outboxes.values()
    await until(lambda: blocks_of(context))
    log.append({bytes([2]) * 32: True})
    told_s = asyncio.get_running_loop().time()
    assert not outbox.tell_blocks(told_s + 1.0), "too early by nine seconds' pause"
    load = LoadSnapshot(running_sequences=1)
    while outbox.load_changed(1, load, told_s):
        pass
    assert not outbox.load_changed(1, load, told_s + 2.0)
    await commands.put(engine_pb2.SessionRequest(pauses=engine_pb2.Pauses(block_events_s=0.5, load_s=0.5)))
    await until(lambda: outbox.tell_blocks(told_s + 1.0))
    assert not outbox.load_changed(1, load, told_s + 2.0), "a burst of the new pause counts as told"
    assert outbox.load_changed(1, load, told_s + 2.5)
    call.cancel()
    await asyncio.wait([call])
