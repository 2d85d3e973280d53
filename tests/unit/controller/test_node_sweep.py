from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.controller import node_sweep
from cluster.controller.rank_marker import RANK_VARIABLE, RUN_VARIABLE, SweepOrder
from tests.unit.controller.builders import incarnation

SLEEP = [sys.executable, "-S", "-c", "import sys; print('up', flush=True); sys.stdin.read()"]


@pytest.fixture
def sleeper(tmp_path):
    started = []

    def start(marker: str, run: str | None = None) -> subprocess.Popen[bytes]:
        environment = {RANK_VARIABLE: marker, RUN_VARIABLE: run or str(tmp_path), "PATH": os.environ["PATH"]}
        child = subprocess.Popen(SLEEP, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(child)
        assert child.stdout.readline() == b"up\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_it_kills_the_dead_generation_and_spares_everybody_else(sleeper, tmp_path):
    doomed = sleeper("c/m/0#1.0")
    spared = [sleeper("c/m/0#2.0"), sleeper("other/m/0#1.0"), sleeper("c/m/0#1.0", "/somewhere/else")]
    order = SweepOrder("c", str(tmp_path), (20000, 20001), live=frozenset({incarnation(0, 2)}))
    swept = node_sweep.sweep_node(order)
    assert swept.killed == (doomed.pid,)
    assert swept.left == ()
    assert doomed.poll() is not None
    assert all(child.poll() is None for child in spared)


def test_segments_of_the_dead_are_unlinked_and_only_those(tmp_path, monkeypatch):
    monkeypatch.setattr(node_sweep, "SHARED_MEMORY", tmp_path)
    name = "deepspeed_allreduce_buffer_{}_127.0.0.1_{}_{}"
    uid = os.getuid()
    old = [tmp_path / name.format(uid, 20000, rank) for rank in range(2)]
    kept = [tmp_path / name.format(uid, 30000, 0), tmp_path / name.format(uid + 1, 20000, 0), tmp_path / "other"]
    fresh = tmp_path / name.format(uid, 20001, 0)
    for file in (*old, *kept, fresh):
        file.write_bytes(b"x")
        if file is not fresh:
            os.utime(file, (1.0, 1.0))
    swept = node_sweep.sweep_node(SweepOrder("c", str(tmp_path), (20000, 20010)))
    assert sorted(swept.segments) == [file.name for file in old]
    assert not any(file.exists() for file in old)
    assert all(file.exists() for file in (*kept, fresh))


def test_a_segment_that_somebody_maps_stays():
    import mmap

    segment = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_23991_0")
    segment.write_bytes(b"x" * 4096)
    os.utime(segment, (1.0, 1.0))
    order = SweepOrder("nobody", "/nowhere", (23991, 23991))
    try:
        with segment.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            assert node_sweep.sweep_node(order).segments == ()
            assert segment.exists()
        assert node_sweep.sweep_node(order).segments == (segment.name,)
    finally:
        segment.unlink(missing_ok=True)


def test_what_is_newer_than_the_order_is_spared():
    order = SweepOrder("c", "/run", (1, 2), live=frozenset({incarnation(1, 1)}), newest=frozenset({
        incarnation(0, 3), incarnation(1, 1)
    }))  # fmt: skip
    condemned = [who for who in ("m/0#2", "m/0#3", "m/0#4", "m/1#1", "m/2#1") if order.condemns(f"c/{who}.0", "/run")]
    assert condemned == ["m/0#2", "m/0#3"]


def test_an_order_without_a_cluster_means_all_of_its_run():
    order = SweepOrder("", "/run", (1, 2))
    assert order.condemns("any/m/0#1.0", "/run")
    assert not order.condemns("any/m/0#1.0", "/other")
