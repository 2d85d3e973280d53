"""Replicas of several pipeline stages: real processes, real sockets, no Ray."""

import random
import socket
import urllib.request

import psutil
import pytest
from replica_harness import Replica, Session, submit
from tiny_models import Reference, build

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build("llama_uneven", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def two_stages(tiny, tmp_path_factory):
    with Replica(tiny, tmp_path_factory.mktemp("logs"), pp=2) as running:
        running.wait_ready()
        yield running


def metric(replica, name: str) -> float:
    port = replica.control.latest[0].ports["metrics"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


def check_concurrent(replica, tiny, count: int) -> None:
    """Greedy tokens of ``count`` prompts that come one after another equal transformers'."""
    reference, rng = Reference(tiny), random.Random(5)
    prompts = {i: [rng.randrange(3, 301) for _ in range(rng.choice([1, 3, 20, 90]))] for i in range(count)}
    late = iter(range(count // 2, count))
    with replica.channel() as channel:
        session = Session(replica.stub(channel))
        session.submit(*(submit(i, prompts[i], 24, stop=[2]) for i in range(count // 2)))

        def one_more(_):
            i = next(late, None)
            if i is not None:
                session.submit(submit(i, prompts[i], 24, stop=[2]))

        tokens, _ = session.collect(prompts, on_update=one_more)
        session.close()
    for i, prompt in prompts.items():
        reference.check(prompt, 24, tokens[i])


def test_two_stages_overlap_and_give_the_tokens_of_transformers(two_stages, tiny):
    check_concurrent(two_stages, tiny, 12)
    assert metric(two_stages, "cluster_engine_overlapped_steps_total") > 20
    two_stages.control.wait_for(
        lambda latest: latest[0].step == latest[1].step > 0 and latest[0].activity.kv_blocks_used == 0
    )


def test_sampling_with_penalties_and_logprobs_continues_exactly_from_the_last_stage(two_stages):
    knobs = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    with two_stages.channel() as channel:
        session = Session(two_stages.stub(channel))
        first = submit(1, [5, 6, 7], 8, **knobs)
        first.logprobs = 2
        session.submit(first)
        told = []
        for response in session.call:
            told += [value for update in response.step.sequences for value in update.logprobs]
            if any(update.end for update in response.step.sequences):
                break
        whole = [value.token_id for value in told]
        assert len(whole) == 8
        assert all(len(value.top) == 2 and value.logprob <= 0 for value in told)
        session.submit(*(submit(10 + cut, [5, 6, 7], 8, generated=whole[:cut], **knobs) for cut in range(1, 8)))
        tokens, _ = session.collect([10 + cut for cut in range(1, 8)])
        session.close()
    assert [whole[:cut] + tokens[10 + cut] for cut in range(1, 8)] == [whole] * 7


def test_no_port_takes_a_stranger(two_stages):
    """Plans and hidden states: their doors are shut once everybody has come. What still listens is on loopback."""
    for port in (two_stages.specs[0].plan_port, two_stages.specs[1].link_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    ports = {
        two_stages.control.latest[0].ports["engine"],
        *(r.ports["metrics"] for r in two_stages.control.latest.values()),
    }
    listening = [
        c
        for p in two_stages.processes
        for c in psutil.Process(p.pid).net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    ]
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
    assert {c.laddr.port for c in listening} == ports, "one rank in a stage needs no torch world"


def test_two_tensor_ranks_in_each_of_two_stages_and_the_end_of_one_ends_all(tiny, tmp_path):
    # Steps so small that the warm-up must keep to them too.
    with Replica(tiny, tmp_path, tp=2, pp=2, max_num_batched_tokens=4) as running:
        running.wait_ready()
        check_concurrent(running, tiny, 8)
        with running.channel() as channel:
            session = Session(running.stub(channel))
            session.submit(submit(1, [4, 5], 200))
            next(r for r in session.call if r.HasField("step"))
            running.processes[3].kill()
            assert [process.wait(20) for process in running.processes[:3]] == [1, 1, 1]
    assert "Rank 3" in running.control.latest[0].failure


def test_an_idle_replica_notices_a_rank_that_is_gone(tiny, tmp_path):
    with Replica(tiny, tmp_path, tp=2) as running:
        running.wait_ready()
        running.processes[1].kill()
        assert running.processes[0].wait(20) == 1
        assert running.control.latest[0].failure == "EngineFailed: Rank 1 is gone."
