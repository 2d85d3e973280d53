"""A replica's real processes, without Ray around them."""

import random

import grpc
import psutil
import pytest
from replica_harness import Replica, Session, submit
from tiny_models import Reference, build

from cluster.domain.block_hash import LeadingNames
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.prefix_index import PrefixIndex
from cluster.v1 import control_pb2, engine_pb2

pytestmark = pytest.mark.integration

MB = 10**6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build("llama_uneven", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def replica(tiny, tmp_path_factory):
    with Replica(tiny, tmp_path_factory.mktemp("logs"), tp=2) as running:
        running.wait_ready()
        yield running
        with running.channel() as channel:
            load = next(r.beat.load for r in Session(running.stub(channel)).call if r.HasField("beat"))
        assert (load.running_sequences, load.waiting_sequences, load.kv_blocks_used) == (0, 0, 0)


def test_a_mixed_batch_over_time_gives_the_tokens_of_transformers(replica, tiny):
    reference, rng = Reference(tiny), random.Random(3)
    prompts = {i: [rng.randrange(3, 301) for _ in range(rng.choice([1, 3, 20, 70]))] for i in range(12)}
    with replica.channel() as channel:
        session = Session(replica.stub(channel))
        session.submit(*(submit(i, prompts[i], 24, stop=[2]) for i in range(4)))
        late = iter(range(4, 12))

        def one_more(tokens):
            i = next(late, None)
            if i is not None:
                session.submit(submit(i, prompts[i], 24, stop=[2]))

        tokens, ends = session.collect(prompts, on_update=one_more)
        session.close()
    for i, prompt in prompts.items():
        reference.check(prompt, 24, tokens[i])
        expected = engine_pb2.SEQUENCE_END_LENGTH if len(tokens[i]) == 24 else engine_pb2.SEQUENCE_END_STOP
        assert ends[i] == expected


def test_continuation_is_exact_at_every_cut(replica):
    knobs = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    with replica.channel() as channel:
        session = Session(replica.stub(channel))
        session.submit(submit(1, [5, 6, 7], 12, **knobs))
        whole = session.collect([1])[0][1]
        session.submit(*(submit(10 + cut, [5, 6, 7], 12, generated=whole[:cut], **knobs) for cut in range(1, 12)))
        tokens, _ = session.collect([10 + cut for cut in range(1, 12)])
        session.close()
    assert [whole[:cut] + tokens[10 + cut] for cut in range(1, 12)] == [whole] * 11


def test_cancel_and_a_broken_session_free_their_blocks(replica):
    with replica.channel() as channel:
        session = Session(replica.stub(channel))
        session.submit(*(submit(i, [4, 5], 200) for i in range(1, 6)))
        next(r for r in session.call if r.HasField("step"))
        session.cancel(1, 2)
        session.close()
    replica.control.wait_for(
        lambda latest: latest[0].activity.kv_blocks_used == 0 and latest[0].activity.running_sequences == 0
    )


def test_beats_come_while_the_engine_is_idle(replica):
    with replica.channel() as channel:
        session = Session(replica.stub(channel))
        beats = 0
        for response in session.call:
            beats += response.HasField("beat")
            if beats == 3:
                break
        session.close()


def test_a_stranger_is_refused(replica):
    with replica.channel() as channel:
        identity = engine_pb2.ReplicaIdentity()
        identity.CopyFrom(replica.stub(channel).Describe(engine_pb2.DescribeRequest(), timeout=10).identity)
        identity.generation += 1
        with pytest.raises(grpc.RpcError) as refused:
            next(iter(Session(replica.stub(channel), identity).call))
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "tiny/0#1" in refused.value.details()


def test_every_rank_went_through_its_phases_and_told_its_bytes(replica, tiny):
    for rank, report in replica.control.latest.items():
        assert replica.control.phases[rank][-2:] == [control_pb2.RANK_PHASE_WARMING_UP, control_pb2.RANK_PHASE_READY]
        assert report.bytes_loaded == report.bytes_total > 0
        assert report.peak_host_bytes <= report.bytes_total + 100 * MB
        assert report.ports["metrics"]
    total = sum(report.bytes_total for report in replica.control.latest.values())
    assert total >= replica.checkpoint.total_bytes


def test_every_rank_listens_on_loopback_alone(replica):
    for process in replica.processes:
        listening = [c for c in psutil.Process(process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert listening
        assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}


class Listener:
    """A session that keeps an index, as a router does."""

    def __init__(self, stub) -> None:
        self.session = Session(stub, block_events=True)
        self.who = Incarnation(ReplicaId("tiny", 0), 1)
        self.index = PrefixIndex()
        self.complete = False
        self.tokens: list[int] = []

    def known(self, tokens) -> int:
        """Leading blocks of ``tokens`` that are held."""
        return self.index.holders(LeadingNames(tokens, 4)).get(self.who)

    def until(self, condition) -> None:
        """Reads on, for as long as the session's own deadline allows."""
        for response in self.session.call:
            for update in response.step.sequences:
                self.tokens += update.token_ids
            if response.HasField("blocks"):
                assert self.index.apply(self.who, response.blocks)
                self.complete |= response.blocks.complete
            if condition():
                return
        raise AssertionError("the session ended early")


def test_routers_hear_which_blocks_the_prefix_cache_holds(replica):
    first = [7, 7, 7, *range(100, 122)]
    others = [[11 * n, *range(40, 290)][:200] for n in range(1, 4)]
    with replica.channel() as channel:
        stub = replica.stub(channel)
        listener = Listener(stub)
        listener.until(lambda: listener.complete)
        listener.session.submit(submit(1, first, 8))
        listener.until(lambda: len(listener.tokens) == 8 and listener.known([*first, *listener.tokens]) == 8)
        assert listener.known(first) == 6, "25 tokens have 6 full blocks; those generated behind them make 2 more"
        late = Listener(stub)
        late.until(lambda: late.complete)
        assert (late.known(first), len(late.index)) == (6, len(listener.index))
        # Three times 50 blocks of 128: the first prompt's leave.
        listener.session.submit(*(submit(2 + n, prompt, 2) for n, prompt in enumerate(others)))
        listener.until(lambda: not listener.known(first) and listener.known(others[-1]) == 50)
        late.until(lambda: len(late.index) == len(listener.index) and not late.known(first))
        listener.index.check()
        for each in (listener, late):
            each.session.close()


def test_shared_memory_all_reduce_gives_the_same_tokens(tiny, tmp_path):
    reference = Reference(tiny)
    with Replica(tiny, tmp_path, tp=2, collective="shm") as running:
        running.wait_ready()
        with running.channel() as channel:
            session = Session(running.stub(channel))
            prompts = {1: [9, 8, 7], 2: list(range(10, 50))}
            session.submit(*(submit(i, p, 20, stop=[2]) for i, p in prompts.items()))
            tokens, _ = session.collect(prompts)
            session.close()
    for i, prompt in prompts.items():
        reference.check(prompt, 20, tokens[i])


def test_a_rank_never_holds_more_than_its_shard_and_a_little(tmp_path):
    """The whole model is larger than the bound: a rank that read all of it would be caught."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 4096}
    folder = build("llama_mha", tmp_path / "model", **sizes)
    with Replica(folder, tmp_path, tp=2) as running:
        running.wait_ready()
        for report in running.control.latest.values():
            print(f"rank {report.rank}: shard {report.bytes_total} bytes, peak {report.peak_host_bytes}")
            assert report.peak_host_bytes <= report.bytes_total + 100 * MB
            assert report.bytes_total + 100 * MB < running.checkpoint.total_bytes
