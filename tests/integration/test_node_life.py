"""Nodes that come, are drained and go, and heads that are started again: as pods do it, on two hosts.

The head has no CPU ranks of its own, is known by a name, and takes its token from a file. Needs root and iproute2.
"""

from __future__ import annotations

import itertools
import os
import signal
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host_namespaces import HEAD, MAX_TOKENS, WHY_NOT, WORKER, Hosts, can_make_namespaces

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

NAME = "cluster-controller.test"
TOKEN = "0123456789abcdef-a-token-of-the-operator"
CONTROL = f"{NAME}:50052"
# The new head may take seconds to come up; from its answer on, its nodes have this long.
NOTICE_S = 20


@pytest.fixture
def hosts():
    if not can_make_namespaces():
        pytest.skip(WHY_NOT)
    with Hosts({NAME: HEAD}) as two:
        (two.folder / "secret").write_text(f"{TOKEN}\n")
        two.run_dir("head")
        yield two


def config_of(hosts: Hosts, replicas: int, more: str = "") -> Path:
    """As a ConfigMap is mounted: a link to a folder, replaced at once."""
    version = hosts.folder / f"version-{len(list(hosts.folder.glob('version-*')))}"
    version.mkdir()
    (version / "cluster.yaml").write_text(
        f"models: [{{model: demo, replicas: {replicas}, tensor_parallel_size: 1}}]\n{more}"
    )
    draft, current = hosts.folder / "draft", hosts.folder / "current"
    draft.symlink_to(version)
    draft.replace(current)
    return current / "cluster.yaml"


def start_head(hosts: Hosts, config: Path) -> dict[str, object]:
    return hosts.start(
        1, "controller", "--config", str(config), "--host", HEAD, "--num-cpus", "0", "--run-dir",
        str(hosts.folder / "head"), "--token-file", str(hosts.folder / "secret"),
    )  # fmt: skip


def start_worker(hosts: Hosts, index: int, host: str, run_dir: str, *options: str) -> dict[str, object]:
    return hosts.start(
        index, "worker", "--address", f"{NAME}:6379", "--host", host, "--num-cpus", "1", "--token-file",
        str(hosts.folder / "secret"), "--run-dir", run_dir, "--controller", CONTROL, *options,
    )  # fmt: skip


def rank_hosts(hosts: Hosts) -> set[str]:
    return {process["node"] for process in hosts.status()["processes"] if process["kind"] == "rank"}


def test_a_drained_node_finishes_its_streams_and_its_replicas_go_elsewhere(hosts):
    config = config_of(hosts, 1)
    start_head(hosts, config)
    head = hosts.processes[-1]
    kept = hosts.folder / "head" / "ray" / "token"
    assert kept.read_text() == TOKEN
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    port = start_worker(hosts, 2, WORKER, hosts.run_dir("b"))["ports"]["metrics"]
    worker = hosts.processes[-1]
    page = f"http://{WORKER}:{port}"
    assert hosts.get(2, f"{page}/healthz") == (200, "ok")
    assert hosts.get(2, f"{page}/startedz")[0] == 503, "its first rank has just been placed, or soon will be"
    router = hosts.start(1, "router", "--controller", CONTROL, "--host", "0.0.0.0", "--run-dir", hosts.run_dir("c"))
    assert router["ports"]["grpc"] == 50051
    hosts.until_ready(1)
    hosts.until(lambda: hosts.get(2, f"{page}/readyz")[0] == 200, lambda: hosts.get(2, f"{page}/metrics"), 10)
    assert hosts.get(2, f"{page}/startedz")[0] == 200
    metrics = hosts.get(2, f"{page}/metrics")[1]
    assert 'cluster_node_ranks{phase="READY"} 1.0' in metrics
    assert "cluster_node_up 1.0" in metrics
    processes = hosts.status()["processes"]
    (told,) = (p for p in processes if p["kind"] == "worker")
    assert (told["node"], told["ports"]) == (WORKER, {"metrics": port})
    rank = next(p for p in processes if p["kind"] == "rank")
    assert hosts.get(2, f"http://{WORKER}:{rank['ports']['metrics']}/readyz") == (200, "ready")

    # The file changes: one more replica, which goes to the node that has just joined.
    idle = start_worker(hosts, 1, HEAD, hosts.run_dir("d"), "--idle-after-s", "1")["ports"]["metrics"]
    hosts.until(lambda: hosts.get(1, f"http://{HEAD}:{idle}/startedz")[0] == 200, lambda: "no idle node starts", 20)
    assert hosts.get(1, f"http://{HEAD}:{idle}/readyz")[0] == 200
    config_of(hosts, 2)
    hosts.until_ready(2)
    assert rank_hosts(hosts) == {HEAD, WORKER}
    config_of(hosts, 2, "controller: {engine_port: 50070}\n")
    hosts.until(lambda: "needs a restart: controller.engine_port" in hosts.said(head), lambda: hosts.said(head), 20)
    config_of(hosts, 2, "routr: {port: 1}\n")
    hosts.until(lambda: "routr" in hosts.said(head), lambda: hosts.said(head), 20)
    assert hosts.said(head).count("refused") == 1
    config_of(hosts, 1)
    hosts.until(lambda: rank_hosts(hosts) == {WORKER}, lambda: hosts.status())

    # Its streams end where they run, while the replica is replaced.
    at_twenty, answers, seen = threading.Event(), [], [0]

    def count() -> None:
        seen[0] += 1
        if seen[0] == 20:
            at_twenty.set()

    stream = threading.Thread(target=lambda: answers.append(hosts.client(count)), daemon=True)
    stream.start()
    assert at_twenty.wait(60)
    drained = hosts.call(2, "drain", "--node", WORKER, "--controller", CONTROL, "--deadline-s", "60")
    assert drained.returncode == 0, drained.stderr
    stream.join(60)
    assert answers[0]["failovers"] == 0
    assert len(answers[0]["tokens"]) == MAX_TOKENS
    hosts.until_ready(1)
    assert rank_hosts(hosts) == {HEAD}
    assert hosts.get(2, f"{page}/readyz")[0] == 503
    assert hosts.get(2, f"{page}/startedz")[0] == 200, "started once, started for good"

    # Nothing new goes there, and status says why; a node that comes back is another one.
    scaled = hosts.call(1, "scale", "demo", "2", "--controller", CONTROL)
    assert scaled.returncode == 0, scaled.stderr
    hosts.until(
        lambda: f"draining, and taken for nothing new: {WORKER}" in hosts.status()["models"][0]["blocked_reason"],
        lambda: hosts.status(),
    )
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    start_worker(hosts, 2, WORKER, str(hosts.folder / "b"))
    hosts.until_ready(2)
    assert rank_hosts(hosts) == {HEAD, WORKER}
    unknown = hosts.call(1, "drain", "--node", "10.77.0.9", "--controller", CONTROL)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert f"nodes are: {HEAD}, {WORKER}" in unknown.stderr


def kill_ray_and_controller(hosts: Hosts, controllers: set[int]) -> None:
    """SIGKILL for the head's Ray processes, the controller's actor and what started them."""
    killed = []
    for pid in hosts.pids(1):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if name in ("gcs_server", "raylet") or pid in controllers:
            os.kill(pid, signal.SIGKILL)
            killed.append(name)
    assert {"gcs_server", "raylet"} <= set(killed)
    assert len(killed) >= 2 + len(controllers)


def test_streams_outlive_their_head_and_a_worker_joins_the_next_one_anew(hosts):
    config, run_dir = config_of(hosts, 1), hosts.run_dir("b")
    start_head(hosts, config)
    head = hosts.processes[-1]
    start_worker(hosts, 2, WORKER, run_dir)
    worker = hosts.processes[-1]
    hosts.start(1, "router", "--controller", CONTROL, "--host", HEAD, "--run-dir", hosts.run_dir("c"))
    router = hosts.processes[-1]
    hosts.until_ready(1)

    # Streams run on the worker when Ray's head and the controller are killed; new ones are served from the last table.
    expected = hosts.client(lambda: None)["tokens"]
    controllers = {p["pid"] for p in hosts.status()["processes"] if p["kind"] == "controller"} | {head.pid}
    seen = itertools.count(1)
    with ThreadPoolExecutor(3) as pool:
        answers = list(
            pool.map(
                lambda _: hosts.client(lambda: next(seen) == 40 and kill_ray_and_controller(hosts, controllers)),
                range(3),
            )
        )
    assert next(seen) > 40
    hosts.kill_all(1, spared={router.pid})
    answers += [hosts.client(lambda: None) for _ in range(3)]
    assert [answer["tokens"] for answer in answers] == [expected] * 6
    assert sum(answer["failovers"] for answer in answers) == 0

    start_head(hosts, config)
    assert worker.wait(NOTICE_S) == 1
    assert "was started again and does not know this node" in hosts.said(worker)
    start_worker(hosts, 2, WORKER, run_dir)
    hosts.until_ready(1)
    assert rank_hosts(hosts) == {WORKER}
    assert hosts.client(lambda: None)["tokens"] == expected, "the router follows the new head"

    # A container that dies leaves its files behind.
    hosts.kill_all(2)
    start_worker(hosts, 2, WORKER, run_dir)
    hosts.until(lambda: "READY" in [r["phase"] for r in hosts.status()["replicas"] if r["generation"] > 2],
                lambda: hosts.status())  # fmt: skip
    assert len(list(Path(run_dir, "ranks").glob("*.json"))) == 1
