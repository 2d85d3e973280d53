"""Step plans and sampled tokens over real sockets on loopback."""

import socket
import threading

import pytest

from cluster.domain.clock import MonotonicClock
from cluster.domain.errors import EngineFailed
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.domain.request import SamplingParams, TokenLogprob
from cluster.engine import rank_socket
from cluster.engine.plan_channel import PlanReceiver, PlanSender, decode_plan, encode_plan
from cluster.engine.rank_socket import Hello, join_rank, watch_peers
from cluster.engine.step import SequenceKey, SequenceStart, StepEntry, StepPlan
from cluster.v1 import engine_pb2

CLOCK = MonotonicClock()
WHO = Incarnation(ReplicaId("m", 2), 4)
PARAMS = SamplingParams(
    max_tokens=9,
    temperature=0.5,
    top_p=0.25,
    seed=2**63,
    stop_token_ids=frozenset({2}),
    logit_bias={3: 0.5},
    logprobs=2,
)
START = SequenceStart(7, PARAMS, (1, 2, 3), (4,))
MIXED = StepPlan(
    7,
    (
        StepEntry(SequenceKey(1, 1), 0, (5,), 12, 3, (9,), sample=True, num_prompt=10),
        StepEntry(SequenceKey(1, 2), 3, (6,), 14, 3, (), sample=True, num_prompt=2),
        StepEntry(SequenceKey(2, 1), 7, tuple(range(300)), 0, 0, tuple(range(75)), sample=False, num_prompt=301),
    ),
    (START,),
)
DECODES = StepPlan(
    8, tuple(StepEntry(SequenceKey(1, i), i, (40 + i,), 12, 3, (), sample=True, num_prompt=10) for i in range(5))
)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ends(port):
    sender = PlanSender("127.0.0.1", port, WHO, 2, print)
    receivers = [PlanReceiver("127.0.0.1", port, WHO, rank) for rank in (1, 2)]
    threads = [threading.Thread(target=r.connect, args=(5.0, CLOCK)) for r in receivers]
    for thread in threads:
        thread.start()
    sender.accept(3, 5.0, CLOCK)
    for thread in threads:
        thread.join(5)
    yield sender, receivers
    sender.close()
    for receiver in receivers:
        receiver.close()


def nameless(plan, starts=()):
    return StepPlan(plan.step, tuple(entry._replace(key=SequenceKey(0, 0)) for entry in plan.entries), starts)


@pytest.mark.parametrize("plan", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("with_starts", [True, False])
def test_a_plan_is_read_back_but_for_the_names(plan, with_starts):
    frame = encode_plan(plan, with_starts=with_starts)
    decoded = decode_plan(engine_pb2.StepPlan.FromString(frame[4:]))
    assert decoded == nameless(plan, plan.starts if with_starts else ())


def test_a_decode_costs_a_few_bytes():
    entries = tuple(
        StepEntry(SequenceKey(1, i), i, (30_000,), 900, 57, (), sample=True, num_prompt=700) for i in range(256)
    )
    assert len(encode_plan(StepPlan(10**6, entries))) < 12 * 256


def test_every_rank_gets_the_plan_and_only_the_sampling_one_the_starts(ends):
    sender, receivers = ends
    sender.send(MIXED)
    sender.send_ready()
    plain, sampling = (decode_plan(receiver.receive()) for receiver in receivers)
    assert plain == nameless(MIXED)
    assert sampling == nameless(MIXED, (START,))
    assert all(receiver.receive().ready for receiver in receivers)


def test_sending_waits_for_no_rank_however_large_the_prompts_are(ends):
    sender, receivers = ends
    starts = tuple(SequenceStart(slot, PARAMS, tuple(range(200_000)), ()) for slot in range(20))
    sent = threading.Event()

    def send():
        for step in (1, 2):
            sender.send(StepPlan(step, MIXED.entries, starts))
        sender.send_ready()
        sent.set()

    threading.Thread(target=send).start()
    assert sent.wait(20), "the leader waited for a rank that does not read"
    assert [receivers[0].receive().step for _ in range(2)] == [1, 2]
    assert [len(receivers[1].receive().sequence_starts) for _ in range(2)] == [20, 20]
    assert all(receiver.receive().ready for receiver in receivers)


def test_sampled_tokens_come_back_with_the_logprobs_that_were_asked_for(ends):
    sender, receivers = ends
    tokens = [(5, None), (6, TokenLogprob(6, -0.5, ((6, -0.5), (1, -2.0)))), (7, None)]
    receivers[1].answer(7, tokens)
    assert sender.receive_tokens(7) == tokens
    receivers[1].answer(8, [])
    with pytest.raises(EngineFailed, match="answered step 8 instead of 9"):
        sender.receive_tokens(9)


def test_the_leader_waits_until_all_have_loaded(ends):
    sender, receivers = ends
    receivers[0].tell_loaded()
    with pytest.raises(EngineFailed, match="Rank 2 does not send"):
        sender.await_loaded(0.05)
    for receiver in receivers:
        receiver.tell_loaded()
    sender.await_loaded(5.0)


def test_an_end_that_goes_is_noticed_even_while_nobody_reads(ends):
    sender, receivers = ends
    lost, gone = [], threading.Event()

    def note(who):
        lost.append(who)
        gone.set()

    watch_peers(sender.sockets, note)
    receivers[1].close()
    assert gone.wait(5)
    assert lost == ["Rank 2"]
    sender.close()
    with pytest.raises(EngineFailed, match="The leader is gone"):
        receivers[0].receive()


def test_missing_ranks_are_named(port):
    with pytest.raises(EngineFailed, match=r"Ranks \[1, 2\] did not join"):
        PlanSender("127.0.0.1", port, WHO, 0, print).accept(3, 0.05, CLOCK)


@pytest.mark.parametrize(
    "stranger",
    [
        Hello(b"plan", Incarnation(ReplicaId("m", 2), 3), 1),
        Hello(b"plan", Incarnation(ReplicaId("m", 1), 4), 1),
        Hello(b"plan", WHO, 2),
        Hello(b"hide", WHO, 1),
    ],
    ids=["another generation", "another replica", "another rank", "another door"],
)
def test_strangers_are_not_let_in(port, stranger):
    sender = PlanSender("127.0.0.1", port, WHO, 0, print)
    joined = join_rank(("127.0.0.1", port), stranger, 5.0, CLOCK)
    with joined:
        with pytest.raises(EngineFailed, match=r"Ranks \[1\]"):
            sender.accept(2, 0.2, CLOCK)
        joined.settimeout(5)
        assert not joined.recv(1)


def test_nobody_knocks_once_all_have_come(ends, port):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_whoever_hangs_up_at_once_is_an_error_of_ours(port, monkeypatch):
    """Between the connection and the first word; the wait for it cannot be timed from outside."""

    def broken(_self, _data):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(
        rank_socket, "_settle", lambda peer: type("Gone", (), {"sendall": broken, "close": peer.close})()
    )
    with socket.create_server(("127.0.0.1", port)), pytest.raises(EngineFailed, match=r"hung up on rank 1: .*Broken"):
        join_rank(("127.0.0.1", port), Hello(b"plan", WHO, 1), 5.0, CLOCK)


def test_nobody_listening_is_an_error_with_a_deadline(port):
    with pytest.raises(EngineFailed, match="Nobody listens"):
        PlanReceiver("127.0.0.1", port, WHO, 1).connect(0.1, CLOCK)
