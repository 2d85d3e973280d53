from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil
import pytest
from prometheus_client import CollectorRegistry

from cluster.config.process_identity import started_s
from cluster.controller.node_health import NodeHealth, NodeView
from cluster.domain.clock import ManualClock
from cluster.domain.replica import RankPhase
from cluster.engine import rank_record
from cluster.engine.progress import RankProgress
from cluster.telemetry.metrics import NodeMetrics
from tests.unit.config.test_process_identity import set_clock

READY, LOADING = RankPhase.READY, RankPhase.LOADING


def views(*steps, idle_after_s=60.0):
    """(seconds, ready, started) after each step: (now, phases, joined)."""
    view, seen = NodeView(), []
    for now_s, phases, joined in steps:
        view = view.seen(phases, now_s, idle_after_s, joined=joined)
        seen.append((now_s, view.ready, view.started))
    return seen


def ready_at(*steps) -> list[float]:
    return [now_s for now_s, ready, _ in views(*steps) if ready]


def started_at(*steps) -> list[float]:
    return [now_s for now_s, _, started in views(*steps) if started]


def test_a_node_is_ready_with_every_rank_and_at_least_one():
    assert ready_at((0, (READY, LOADING), True), (1, (READY, READY), True), (2, (), True)) == [1]


def test_ready_ranks_serve_on_while_the_head_is_away():
    assert ready_at((0, (READY,), True), (1, (READY,), False), (2, (), False)) == [0, 1]


def test_started_when_its_first_ranks_are_ready_and_for_good():
    steps = [(0, (), False), (1, (), True), (2, (LOADING,), True), (500, (READY, LOADING), True)]
    assert started_at(*steps) == []
    after = [(501, (READY, READY), True), (502, (LOADING,), True), (503, (), False)]
    assert started_at(*steps, *after) == [501, 502, 503]
    assert ready_at(*steps, *after) == [501]


def test_started_and_ready_when_no_rank_came_for_long_enough():
    assert started_at((0, (), True), (59, (), True)) == []
    assert started_at((0, (), True), (60, (), True), (61, (LOADING,), True)) == [60, 61]
    assert ready_at((0, (), True), (60, (), True), (61, (LOADING,), True), (62, (READY,), True)) == [60, 62]


def test_a_node_that_lost_its_ranks_is_not_ready_until_it_has_been_idle():
    assert ready_at((0, (READY,), True), (10, (), True), (69, (), True), (70, (), True)) == [0, 70]


def test_idleness_counts_from_the_join_and_from_the_last_rank():
    assert started_at((0, (), False), (100, (), True), (159, (), True)) == []
    assert started_at((0, (), True), (50, (LOADING,), True), (70, (), True), (100, (), True)) == []
    assert started_at((0, (), True), (50, (LOADING,), True), (70, (), True), (130, (), True)) == [130]
    assert started_at((0, (), True), (30, (), False), (70, (), True)) == []


class Node:
    def __init__(self, folder) -> None:
        self.clock, self.registry, self.joined = ManualClock(), CollectorRegistry(), True
        self.health = NodeHealth(folder, self.clock, 60.0, NodeMetrics(self.registry), lambda: self.joined)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def started(self) -> int:
        return self.health.routes()["/startedz"]().status


@pytest.fixture
def progress() -> RankProgress:
    made = RankProgress(ManualClock())
    made.ports["metrics"] = 9101
    return made


def test_a_node_reads_its_ranks_off_their_records(tmp_path, progress):
    node = Node(tmp_path)
    assert (node.health.ready(), node.started()) == (False, 503)
    rank_record.leave(tmp_path, "m/0#1.0", progress)
    assert (node.health.ready(), node.value("cluster_node_ranks", phase="STARTING")) == (False, 1)
    progress.phase = READY
    rank_record.leave(tmp_path, "m/0#1.0", progress)
    assert (node.health.ready(), node.started()) == (True, 200)
    assert node.value("cluster_node_ranks", phase="STARTING") == 0
    assert node.value("cluster_node_ranks", phase="READY") == 1
    assert node.value("cluster_node_up") == 1
    node.joined = False
    node.health.look()
    assert node.value("cluster_node_up") == 0


def test_an_idle_node_is_ready_by_waiting(tmp_path):
    node = Node(tmp_path)
    node.clock.advance(59)
    assert node.started() == 503
    node.clock.advance(1)
    assert node.started() == 200
    assert node.health.ready()


def test_a_record_tells_one_process(tmp_path, progress):
    rank_record.leave(tmp_path, "m/0#1.0", progress)
    (record,) = rank_record.living(tmp_path)
    assert (record.rank, record.pid, record.phase) == ("m/0#1.0", os.getpid(), RankPhase.STARTING)
    assert record.ports == {"metrics": 9101}


def test_what_the_dead_left_is_nobodys_and_goes(tmp_path, progress):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    folder = tmp_path / "ranks"
    folder.mkdir()
    mine = started_s(psutil.Process())
    stored = {"rank": "r", "phase": "READY", "ports": {}}
    (folder / "1.json").write_text(json.dumps({**stored, "pid": child.pid, "started_s": mine}))
    (folder / "2.json").write_text(json.dumps({**stored, "pid": os.getpid(), "started_s": mine - 100}))
    (folder / "3.json").write_text("{")
    (folder / "4.json").write_text(json.dumps({**stored, "pid": os.getpid(), "started_s": mine, "phase": "?"}))
    assert rank_record.living(tmp_path) == ()
    assert list(folder.iterdir()) == []
    rank_record.leave(tmp_path, "m/0#1.0", progress)
    assert len(rank_record.living(tmp_path)) == 1


def test_a_rank_lives_on_when_the_clock_is_set(tmp_path, progress, monkeypatch):
    booted = psutil.boot_time()
    rank_record.leave(tmp_path, "m/0#1.0", progress)
    set_clock(monkeypatch, booted + 30)
    assert len(rank_record.living(tmp_path)) == 1


def test_a_node_without_a_folder_has_no_ranks(tmp_path):
    assert rank_record.living(tmp_path / "none") == ()
