from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.config.schema import ControllerConfig
from cluster.controller import ray_start
from cluster.controller.ray_start import RayNode
from cluster.domain.errors import ConfigError

SLEEP = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]


def test_nothing_was_started_nothing_is_stopped(tmp_path):
    assert ray_start.load_node(tmp_path) is None
    assert ray_start.stop_node(tmp_path) == 0


def test_stop_ends_exactly_what_was_recorded(tmp_path):
    ours, other = (subprocess.Popen(SLEEP, stdin=subprocess.PIPE) for _ in range(2))
    try:
        started = psutil.Process(ours.pid).create_time()
        recycled = (other.pid, started - 1000.0)  # the id of a process that ended long ago
        node = RayNode("127.0.0.1:1", str(tmp_path / "ray"), "t", ((ours.pid, started), recycled))
        ray_start._save(tmp_path, node)
        assert ray_start.load_node(tmp_path) == node
        assert not ray_start.is_alive(node)
        assert ray_start.stop_node(tmp_path) == 1
        assert ours.poll() is not None
        assert other.poll() is None
        assert ray_start.load_node(tmp_path) is None
    finally:
        for child in (ours, other):
            child.kill()
            child.communicate()


def test_a_token_is_made_once_and_private(tmp_path):
    ray_start._make_token(tmp_path)
    token = ray_start.token_path(tmp_path)
    text = token.read_text()
    ray_start._make_token(tmp_path)
    assert token.read_text() == text
    assert len(text) == 64
    assert token.stat().st_mode & 0o777 == 0o600


def test_joining_needs_the_heads_token(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="--token-file"):
        ray_start.start_worker("10.0.0.1:6379", tmp_path, host="127.0.0.1")
    with pytest.raises(ConfigError, match="cannot be read"):
        ray_start.start_worker("10.0.0.1:6379", tmp_path, host="10.0.0.2", token_file=tmp_path / "none")


def test_rays_folder_stays_short_enough_for_its_sockets(tmp_path):
    deep = tmp_path / ("x" * 60)
    folder = ray_start._folder(deep)
    assert len(folder) <= 42
    assert not folder.startswith(str(deep))
    Path(folder).rmdir()


def test_loopback_stays_loopback(tmp_path):
    assert ray_start._environment(tmp_path, "127.0.0.1")["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in ray_start._environment(tmp_path, "10.0.0.1")
    assert ray_start._environment(tmp_path, "10.0.0.1")["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("ports", [(20001, 20000), (80, 90), (20000, 70000)])
def test_rank_ports_are_a_range(ports):
    with pytest.raises(ValueError, match="rank_ports"):
        ControllerConfig(rank_ports=ports)
