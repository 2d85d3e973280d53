from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.config.process_identity import started_s
from cluster.config.schema import ControllerConfig
from cluster.controller import ray_start
from cluster.controller.ray_start import RayNode
from cluster.controller.ray_token import token_path
from cluster.domain.errors import ConfigError

SLEEP = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]


def test_nothing_was_started_nothing_is_stopped(tmp_path):
    assert ray_start.load_node(tmp_path) is None
    assert ray_start.stop_node(tmp_path) == 0


def test_stop_ends_exactly_what_was_recorded(tmp_path):
    ours, other = (subprocess.Popen(SLEEP, stdin=subprocess.PIPE) for _ in range(2))
    try:
        started = started_s(psutil.Process(ours.pid))
        recycled = (other.pid, started - 1000.0)  # the id of a process that ended long ago
        node = RayNode("127.0.0.1:1", "t", ((ours.pid, started), recycled))
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


@pytest.fixture
def living_node(tmp_path):
    child = subprocess.Popen(SLEEP, stdin=subprocess.PIPE)
    node = RayNode("127.0.0.1:1", "t", ((child.pid, started_s(psutil.Process(child.pid))),))
    ray_start._save(tmp_path, node)
    yield node
    child.kill()
    child.communicate()


@pytest.mark.parametrize("start", ["head", "worker"])
def test_a_second_node_under_one_run_directory_is_refused(tmp_path, living_node, start):
    token = tmp_path / "other"
    token.write_text("other")
    starts = {
        "head": lambda: ray_start.start_head(tmp_path, num_cpus=1),
        "worker": lambda: ray_start.start_worker("10.0.0.1:6379", tmp_path, host="10.0.0.2", token_file=token),
    }
    with pytest.raises(ConfigError, match=r"runs under .* already"):
        starts[start]()
    assert ray_start.load_node(tmp_path) == living_node
    assert ray_start.is_alive(living_node)
    assert not token_path(tmp_path).exists()


def test_a_damaged_record_is_named(tmp_path):
    ray_start._save(tmp_path, RayNode("a", "t", ()))
    (tmp_path / "ray" / "node.json").write_text("{")
    with pytest.raises(ConfigError, match=r"node\.json is damaged"):
        ray_start.load_node(tmp_path)


def test_a_token_that_cannot_be_read_is_named_before_anything_is_joined(tmp_path):
    with pytest.raises(ConfigError, match=r"token file .* cannot be read"):
        ray_start.connect("127.0.0.1:1", token_file=tmp_path / "none")


def test_loopback_stays_loopback(tmp_path):
    assert ray_start._environment(tmp_path, "127.0.0.1")["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in ray_start._environment(tmp_path, "10.0.0.1")
    assert ray_start._environment(tmp_path, "10.0.0.1")["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("ports", [(20001, 20000), (80, 90), (20000, 70000)])
def test_rank_ports_are_a_range(ports):
    with pytest.raises(ValueError, match="rank_ports"):
        ControllerConfig(rank_ports=ports)


def test_ranks_that_start_with_their_node_are_no_part_of_it():
    """Of what stands for a raylet and a rank of it, only the first one's end is the node's."""
    program = f"import subprocess, sys; print(subprocess.Popen({SLEEP!r}).pid, flush=True); sys.stdin.read()"
    raylet = subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        rank = psutil.Process(int(raylet.stdout.readline()))
        node = RayNode("127.0.0.1:1", "t", ray_start._session_members(raylet.pid))
        assert [pid for pid, _ in node.processes] == [raylet.pid]
        rank.kill()
        assert ray_start.is_alive(node)
        raylet.kill()
        raylet.wait()
        assert not ray_start.is_alive(node)
    finally:
        raylet.kill()
        raylet.communicate()


def test_a_head_lives_while_its_gcs_and_its_raylet_do(tmp_path):
    assert not ray_start.head_is_alive(tmp_path)
    children = {}
    for name in ("gcs_server", "raylet", "dashboard"):
        (tmp_path / name).symlink_to("/bin/sleep")  # the kernel names a process after its file
        children[name] = subprocess.Popen([tmp_path / name, "60"])
    try:
        started = tuple((c.pid, started_s(psutil.Process(c.pid))) for c in children.values())
        ray_start._save(tmp_path, RayNode("127.0.0.1:1", "t", started))
        assert ray_start.head_is_alive(tmp_path)
        children["dashboard"].kill()
        children["dashboard"].wait()
        assert ray_start.head_is_alive(tmp_path)
        children["gcs_server"].kill()
        children["gcs_server"].wait()
        assert not ray_start.head_is_alive(tmp_path)
    finally:
        for child in children.values():
            child.kill()
            child.wait()


@pytest.mark.parametrize(("name", "last_words"), [("gcs_server", b""), ("raylet", b"bye")])
def test_only_a_worker_takes_leave_of_its_head(tmp_path, name, last_words):
    """A head ends at once: it does not wait for a gcs_server that takes no notice of SIGTERM."""
    (tmp_path / name).symlink_to("/bin/bash")
    program = "trap 'printf bye; exit' TERM; echo; read"
    command = [tmp_path / name, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"\n"
        ray_start._save(tmp_path, RayNode("127.0.0.1:1", "t", ((child.pid, started_s(psutil.Process(child.pid))),)))
        assert ray_start.stop_node(tmp_path) == 1
        assert child.stdout.read() == last_words


def test_sigterm_stays_with_whoever_had_it():
    """Ray takes it when it joins, and leaves it to nobody when it leaves."""

    def drain(_number: int, _frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, drain)
    try:
        with ray_start._sigterm_kept():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is drain
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ray_s_workers_do_not_look_for_modules_where_the_command_was_given(tmp_path, monkeypatch):
    """A folder named "cluster" there would run instead of the package: Ray gives workers the driver's folder."""
    import ray

    import cluster

    seen = []

    def init(*, job_config, **_):
        seen.append((Path.cwd(), job_config._py_driver_sys_path, job_config._runtime_env_has_working_dir()))

    monkeypatch.setattr(ray_start, "_require_listener", lambda _: None)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.chdir(tmp_path)
    ray_start.connect("127.0.0.1:1")
    # The folder of the process is all its threads': it stays what it is.
    assert seen == [(tmp_path, [str(Path(cluster.__file__).parents[1])], True)]


def test_the_environment_s_token_is_named_from_any_folder(tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(ray_start, "_require_listener", lambda _: None)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "secret/token")
    monkeypatch.chdir(tmp_path)
    ray_start.connect("127.0.0.1:1")
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "secret/token")
