"""A worker with Ray and its head fake: when it joins, what it listens on meanwhile, when it ends."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from cluster.controller import node_process, ray_start
from cluster.controller.node_options import NodeOptions
from cluster.controller.node_process import NodeProcess
from cluster.controller.ray_head import cluster_id, must_end
from cluster.controller.ray_start import RayNode
from cluster.domain.clock import ManualClock
from cluster.domain.errors import ConfigError, ReplicaError

TOKEN = "0123456789abcdef"


class Interrupt:
    """Set after so many waits; every wait takes its time on the clock."""

    def __init__(self, clock: ManualClock, after: int = 1000) -> None:
        self.clock, self.after = clock, after

    def wait(self, seconds: float) -> bool:
        self.clock.advance(seconds)
        self.after -= 1
        return self.after < 0


class Site:
    def __init__(self, folder, monkeypatch) -> None:
        self.folder, self.clock = folder, ManualClock()
        self.done: list[str] = []
        self.said: list[str] = []
        self.heads: list[str | None] = ["one"]  # what answers, the last one for ever
        self.alive = True
        (folder / "given").write_text(TOKEN)
        monkeypatch.setattr(node_process, "cluster_id", self.cluster_id)
        monkeypatch.setattr(ray_start, "start_worker", self.start_worker)
        monkeypatch.setattr(ray_start, "is_alive", lambda _: self.alive)
        monkeypatch.setattr(ray_start, "stop_node", lambda _: self.done.append("stop"))

    def cluster_id(self, address: str, token: str) -> str | None:
        assert token == TOKEN
        return self.heads.pop(0) if len(self.heads) > 1 else self.heads[0]

    def start_worker(self, address: str, run_dir, **options) -> RayNode:
        self.done.append(f"join {address} with {options['num_gpus']} GPUs")
        return RayNode(address, "t", ())

    def run(self, interrupt: Interrupt | None = None, address: str = "head:6379", started=lambda _: None) -> None:
        options = NodeOptions(address, "127.0.0.1", 1, 2, self.folder / "given", metrics_port=0)
        process = NodeProcess(options, self.folder, self.clock, self.said.append)
        process.run(interrupt or Interrupt(self.clock), started)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_it_joins_and_ends_its_node_when_told(site):
    site.run(Interrupt(site.clock, after=3))
    assert site.done == ["join head:6379 with 2 GPUs", "stop"]


def test_it_waits_for_its_head_and_says_so_once(site):
    site.heads = [None, None, None, "one"]
    site.run(Interrupt(site.clock, after=5))
    assert site.said == ["Waiting for the head at head:6379."]
    assert site.done[0].startswith("join")


def test_it_waits_boundedly(site):
    site.heads = [None]
    with pytest.raises(ReplicaError, match="No Ray head has answered at head:6379"):
        site.run()
    assert node_process.HEAD_WAIT_S < site.clock.now() < node_process.HEAD_WAIT_S + 5
    assert site.done == []


def test_told_to_end_while_it_waits_it_does(site):
    site.heads = [None]
    site.run(Interrupt(site.clock, after=3))
    assert site.done == []


def test_a_head_that_is_away_is_no_reason_to_end(site):
    site.heads = ["one", *[None] * 20, "one"]
    site.run(Interrupt(site.clock, after=30))
    assert site.done[-1] == "stop"


def test_another_head_at_the_same_address_is(site):
    site.heads = ["one", "one", None, "two"]
    with pytest.raises(ReplicaError, match="started again and does not know this node"):
        site.run()
    assert site.done[-1] == "stop"


def test_a_node_whose_process_died_is_ended(site):
    site.alive = False
    with pytest.raises(ReplicaError, match="has ended"):
        site.run()
    assert site.done[-1] == "stop"


def test_a_head_on_loopback_is_refused_before_anything(site):
    with pytest.raises(ConfigError, match="loopback only"):
        site.run(address="127.0.0.1:6379")


def test_its_pages_are_there_while_it_is_a_node_and_not_afterwards(site):
    seen: list[tuple[int, int]] = []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def started(ports: dict[str, int]) -> None:
        with opener.open(f"http://127.0.0.1:{ports['metrics']}/healthz", timeout=5) as answer:
            seen.append((ports["metrics"], answer.status))

    site.run(Interrupt(site.clock, after=1), started=started)
    ((port, status),) = seen
    assert status == 200
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        raise AssertionError("somebody listens still")


def test_only_another_head_ends_a_node():
    assert must_end("one", "two")
    assert not must_end("one", "one")
    assert not must_end("one", None)


def test_nobody_at_an_address_is_nobody(monkeypatch):
    monkeypatch.setattr("cluster.controller.ray_head.CALL_DEADLINE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert cluster_id(f"127.0.0.1:{port}", TOKEN) is None


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:ray", "head:0", "head:65536"])
def test_an_address_that_is_none_is_refused_before_anything(site, address):
    with pytest.raises(ConfigError, match="no HOST:PORT"):
        site.run(address=address)
    assert site.done == []
