"""Three ranks in one process: plans, hidden states and tokens travel over real sockets, the model is arithmetic."""

import contextlib
import gc
import socket
import threading
from types import SimpleNamespace

import pytest
import torch

from cluster.domain.clock import MonotonicClock
from cluster.domain.errors import CheckpointError, EngineFailed
from cluster.domain.hardware import DeviceKind
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.model_spec import Dtype
from cluster.domain.parallel_layout import ParallelLayout
from cluster.domain.request import SamplingParams
from cluster.engine.progress import RankProgress
from cluster.engine.rank_channels import RankChannels
from cluster.engine.runner import LeaderRunner, RankShare, follow, warm_up_plans
from cluster.engine.step import SequenceKey, SequenceStart, StepEntry, StepPlan

CLOCK = MonotonicClock()
COLUMNS, VOCABULARY = 4, 11


@pytest.fixture(autouse=True)
def _collected_as_before():
    """What a warmed-up rank tells its garbage collector is for its whole process, here for one test."""
    yield
    gc.unfreeze()


class Arithmetic:
    """Stage s adds s + 1 to every value; the logits of the last one name the token (sum of the row) % VOCABULARY."""

    def __init__(self, stage, count, poison=False):
        self.stage, self.last, self.poison = stage, stage == count - 1, poison
        self.threads = set()

    def forward(self, plan, hidden=None):
        assert (hidden is None) == (self.stage == 0)
        tokens = torch.tensor([float(t) for e in plan.entries for t in e.token_ids])
        rows = tokens[:, None].repeat(1, COLUMNS) if hidden is None else hidden.clone()
        rows += self.stage + 1
        if not self.last:
            return rows
        ends, first = [], 0
        for entry in plan.entries:
            first += len(entry.token_ids)
            if entry.sample:
                ends.append(first - 1)
        wanted = rows[ends].sum(1).long() % VOCABULARY
        logits = torch.nn.functional.one_hot(wanted, VOCABULARY).float()
        return logits / 0 if self.poison else logits


class Greedy:
    def __init__(self):
        self.starts = []

    def start(self, start):
        self.starts.append(start)

    def sample(self, logits, slots):
        assert len(logits) == len(slots)
        return [SimpleNamespace(token_id=int(token), logprob=None) for token in logits.argmax(-1)]


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def spec(rank, stages, ports):
    """What RankChannels reads of a RankSpec."""
    return SimpleNamespace(
        rank_id=RankId(Incarnation(ReplicaId("m", 0), 3), rank), rank=rank, layout=ParallelLayout(1, stages),
        world_size=stages, is_leader=rank == 0, sampling_rank=stages - 1, plan_host="127.0.0.1", plan_port=ports[0],
        bind_host="127.0.0.1", link_port=ports[rank] if rank else 0, next_host="127.0.0.1",
        next_port=ports[rank + 1] if rank + 1 < stages else 0, max_num_batched_tokens=64, dtype=Dtype.FLOAT32,
        device=DeviceKind.CPU,
    )  # fmt: skip


class Pipeline:
    def __init__(self, stages, poison=False):
        ports = free_ports(stages)
        self.lost = [threading.Event() for _ in range(stages)]
        self.channels = [
            RankChannels(spec(rank, stages, ports), COLUMNS, lambda _, event=self.lost[rank]: event.set())
            for rank in range(stages)
        ]
        opening = [threading.Thread(target=c.open, args=(5.0, CLOCK)) for c in self.channels]
        for thread in opening:
            thread.start()
        for thread in opening:
            thread.join(10)
        self.sampler = Greedy()
        shares = [
            RankShare(Arithmetic(i, stages, poison), self.sampler if i == stages - 1 else None, c.incoming, c.outgoing)
            for i, c in enumerate(self.channels)
        ]
        self.progress = [RankProgress(CLOCK) for _ in range(stages)]
        self.ready, self.errors = [threading.Event() for _ in range(stages)], [None] * stages
        self.followers = [threading.Thread(target=self._follow, args=(i, shares[i])) for i in range(1, stages)]
        for thread in self.followers:
            thread.start()
        if self.channels[0].sender:
            self.channels[0].sender.await_loaded(5.0)
        self.runner = LeaderRunner(shares[0], self.channels[0].sender, self.progress[0], stages)

    def _follow(self, rank, share):
        receiver = self.channels[rank].receiver
        receiver.tell_loaded()
        try:
            follow(share, receiver, self.progress[rank], self.ready[rank].set)
        except (EngineFailed, CheckpointError) as error:
            self.errors[rank] = str(error)
            self.close(rank)

    def stop(self):
        self.close(0)
        for thread in self.followers:
            thread.join(10)
            assert not thread.is_alive()

    def close(self, rank):
        channels = self.channels[rank]
        for end in (channels.sender, channels.receiver, channels.incoming, channels.outgoing):
            if end is not None:
                end.close()


@pytest.fixture
def pipeline():
    made = []

    def new(*args, **options):
        made.append(Pipeline(*args, **options))
        return made[-1]

    yield new
    for one in made:
        one.stop()


def plan(step, *token_ids, starts=(), sample=True):
    return StepPlan(
        step,
        tuple(
            StepEntry(SequenceKey(1, slot), slot, ids, 0, 0, (slot,), sample, 3) for slot, ids in enumerate(token_ids)
        ),
        starts,
    )


def expected(ids, stages):
    return (COLUMNS * (ids[-1] + sum(range(1, stages + 1)))) % VOCABULARY


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_tokens_come_back_in_order_from_as_many_plans_as_there_are_stages(pipeline, stages):
    pipe = pipeline(stages)
    pipe.runner.warm_up(64, 16, 4)
    assert all(ready.wait(5) for ready in pipe.ready[1:])
    start = SequenceStart(0, SamplingParams(max_tokens=3), (1, 2, 3), ())
    inputs = {step: ((1, 2, step), (step + 40,)) for step in range(1, 8)}
    waiting = []
    for step, ids in inputs.items():
        pipe.runner.dispatch(plan(step, *ids, starts=(start,) if step == 1 else ()))
        waiting.append(step)
        if len(waiting) == pipe.runner.depth or step == 7:
            while waiting:
                done = waiting.pop(0)
                result = pipe.runner.collect()
                assert result.step == done
                assert [t.token_id for t in result.tokens] == [expected(i, stages) for i in inputs[done]]
                assert [t.key for t in result.tokens] == [SequenceKey(1, 0), SequenceKey(1, 1)]
    assert pipe.sampler.starts[-1] == start
    pipe.stop()
    assert [p.step for p in pipe.progress[1:]] == [7] * (stages - 1)


def test_a_plan_that_samples_nothing_is_waited_for_too(pipeline):
    pipe = pipeline(2)
    pipe.runner.dispatch(plan(1, (1, 2), sample=False))
    assert pipe.runner.collect().tokens == ()
    pipe.stop()
    assert pipe.progress[1].step == 1


def test_logits_that_are_not_finite_end_the_rank_that_sees_them(pipeline):
    pipe = pipeline(2, poison=True)
    with pytest.raises(EngineFailed, match="Rank 1"):
        pipe.runner.warm_up(64, 16, 4)
    pipe.followers[0].join(10)
    assert "not finite" in pipe.errors[1]
    assert pipe.lost[0].wait(5)
    with pytest.raises(CheckpointError, match="not finite"):
        pipeline(1, poison=True).runner.warm_up(64, 16, 4)


def test_a_leader_that_waits_for_the_last_stage_says_so(pipeline):
    pipe = pipeline(2)
    pipe.runner.warm_up(64, 16, 4)
    seen = []
    receive = pipe.channels[0].sender.receive_tokens
    pipe.channels[0].sender.receive_tokens = lambda step: seen.append(pipe.progress[0].waits_for_peer) or receive(step)
    pipe.runner.dispatch(plan(1, (1, 2)))
    pipe.runner.collect()
    assert seen == [True]
    assert not pipe.progress[0].waits_for_peer


def test_when_a_rank_in_the_middle_goes_all_others_hear_of_it(pipeline):
    pipe = pipeline(3)
    pipe.runner.warm_up(64, 16, 4)
    for peer in pipe.channels[1]._sockets().values():
        with contextlib.suppress(OSError):  # the rank itself was faster
            peer.shutdown(socket.SHUT_RDWR)
    assert pipe.lost[0].wait(5)
    assert pipe.lost[2].wait(5)


@pytest.mark.parametrize(("length", "blocks", "block_size"), [(256, 128, 4), (2, 8, 1), (64, 1, 8), (64, 3, 3)])
def test_the_warm_up_stays_within_the_cache(length, blocks, block_size):
    prefill, decode = warm_up_plans(length, blocks, block_size)
    table = {}
    for entry in (*prefill.entries, *decode.entries):
        for i, block in enumerate(entry.new_block_ids):
            table[entry.first_block + i] = block
        assert entry.end <= min(length, len(table) * block_size)
    assert sorted(table.values()) == list(range(len(table)))
    assert len(table) <= blocks


def test_after_the_warm_up_collections_do_not_look_at_the_model_again():
    gc.unfreeze()
    model = Arithmetic(0, 1)
    share = RankShare(model, Greedy())
    assert any(one is model for one in gc.get_objects())
    share.ready()
    assert not any(one is model for one in gc.get_objects())
