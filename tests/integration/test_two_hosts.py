"""Two hosts on one machine, a network namespace each: head and router on one, a worker on the other.

Needs root and iproute2; says so and skips where it cannot have them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

DEADLINE_S = 120
HEAD, WORKER = "10.77.0.1", "10.77.0.2"
PROMPT, MAX_TOKENS, STREAMS = "Return the ", 150, 4
# Runs inside the head's namespace: a test process cannot enter another network half-way.
CLIENT = """
import json, sys
from cluster.client import Chunk, Client
with Client(sys.argv[1]) as client:
    for event in client.generate(sys.argv[2], max_tokens=int(sys.argv[3])):
        if isinstance(event, Chunk):
            print("token", flush=True)
        else:
            print(json.dumps({"tokens": event.token_ids, "failovers": event.usage.failovers}), flush=True)
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"llmc{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=10, check=False).returncode == 0
    if made:
        run("ip", "netns", "del", name)
    return made


class Hosts:
    """Two namespaces on a bridge in a third, and the processes inside them."""

    def __init__(self) -> None:
        self.name = f"llmc{os.getpid()}"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="llmc-"))

    def __enter__(self) -> Hosts:
        switch = f"{self.name}sw"
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "br0", "up")
        for index, address in ((1, HEAD), (2, WORKER)):
            host = self.host(index)
            run("ip", "netns", "add", host)
            run(
                "ip", "link", "add", f"p{index}", "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", host
            )
            run("ip", "-n", switch, "link", "set", f"p{index}", "master", "br0", "up")
            run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", host, "link", "set", "eth0", "up")
            run("ip", "-n", host, "link", "set", "lo", "up")
        return self

    def host(self, index: int) -> str:
        return f"{self.name}h{index}"

    def cut_off(self, index: int) -> None:
        run("ip", "-n", f"{self.name}sw", "link", "set", f"p{index}", "down")

    def start(self, index: int, *arguments: str) -> dict[str, object]:
        """A command of ours inside a host; its ready line."""
        errors = (self.folder / f"{len(self.processes)}.err").open("wb")
        command = ["ip", "netns", "exec", self.host(index), sys.executable, "-m", "cluster", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        errors.close()
        self.processes.append(process)
        line: list[bytes] = []
        reader = threading.Thread(target=lambda: line.append(process.stdout.readline()), daemon=True)
        reader.start()
        reader.join(DEADLINE_S)
        assert line, f"{arguments[0]} said nothing"
        assert line[0], Path(errors.name).read_text()
        return json.loads(line[0])

    def client(self, on_token) -> dict[str, object]:
        command = ["ip", "netns", "exec", self.host(1), sys.executable, "-c", CLIENT, f"{HEAD}:50051", PROMPT]
        with subprocess.Popen([*command, str(MAX_TOKENS)], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.strip() != "token":
                    return json.loads(line)
                on_token()
        raise AssertionError("the stream ended without its end")

    def status(self) -> dict[str, object]:
        command = ["ip", "netns", "exec", self.host(1), sys.executable, "-m", "cluster", "status", "--json"]
        answer = subprocess.run(
            [*command, "--controller", f"{HEAD}:50052"], capture_output=True, timeout=60, check=True, text=True
        )
        return json.loads(answer.stdout)

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
            process.stdout.close()
        for index in (1, 2):
            pids = subprocess.run(
                ["ip", "netns", "pids", self.host(index)], capture_output=True, text=True, timeout=10, check=True
            ).stdout.split()
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
        for name in (f"{self.name}sw", self.host(1), self.host(2)):
            run("ip", "netns", "del", name)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def hosts():
    if not can_make_namespaces():
        pytest.skip("network namespaces need root and iproute2")
    with Hosts() as two:
        yield two


def short_dir(hosts: Hosts, name: str) -> str:
    folder = hosts.folder / name
    folder.mkdir(mode=0o700)
    return str(folder)


def test_streams_outlive_the_host_they_ran_on(hosts):
    config = hosts.folder / "models.yaml"
    config.write_text("models: [{model: demo, replicas: 2, tensor_parallel_size: 2}]\n")
    head_dir = short_dir(hosts, "a")
    # One replica would fit here: the head waits until the other host has joined.
    hosts.start(1, "controller", "--config", str(config), "--host", HEAD, "--num-cpus", "2", "--run-dir", head_dir)
    worker_dir, token = short_dir(hosts, "b"), f"{head_dir}/ray/token"
    hosts.start(
        2, "worker", "--address", f"{HEAD}:6379", "--host", WORKER, "--num-cpus", "2", "--token-file", token,
        "--run-dir", worker_dir,
    )  # fmt: skip
    hosts.start(1, "router", "--controller", f"{HEAD}:50052", "--host", HEAD, "--run-dir", short_dir(hosts, "c"))
    end = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while [r["phase"] for r in hosts.status()["replicas"]] != ["READY"] * 2:
        assert time.monotonic() < end, hosts.status()
        pause.wait(0.5)
    engines = {r["engine_address"].partition(":")[0] for r in hosts.status()["replicas"]}
    assert engines == {HEAD, WORKER}, "each host has one replica"
    expected = hosts.client(lambda: None)["tokens"]
    assert len(expected) == MAX_TOKENS

    seen, lock = [0], threading.Lock()

    def cut_at_forty() -> None:
        with lock:
            seen[0] += 1
            if seen[0] == 40:
                hosts.cut_off(2)

    with ThreadPoolExecutor(STREAMS) as pool:
        answers = list(pool.map(lambda _: hosts.client(cut_at_forty), range(STREAMS)))
    assert [answer["tokens"] for answer in answers] == [expected] * STREAMS
    assert sum(answer["failovers"] for answer in answers) >= 1, "no stream ran on the host that was cut off"
