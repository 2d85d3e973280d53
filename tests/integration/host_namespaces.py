"""Two hosts on one machine, a network namespace each, joined by a bridge: what needs root and iproute2."""

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
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from resident_command import ResidentCommand

DEADLINE_S = 120
HEAD, WORKER = "10.77.0.1", "10.77.0.2"
WHY_NOT = "network namespaces need root and iproute2"
NAMES = Path("/etc/netns")  # what `ip netns exec` lays over /etc
PROMPT, MAX_TOKENS = "Return the ", 150
# Runs inside the head's namespace: a test process cannot enter another network half-way.
CLIENT = """
import json, sys, time
from cluster.client import Chunk, Client
last_s, gap_s = None, 0.0
with Client(sys.argv[1]) as client:
    for event in client.generate(sys.argv[2], max_tokens=int(sys.argv[3])):
        if isinstance(event, Chunk):
            now_s = time.monotonic()
            gap_s, last_s = max(gap_s, now_s - (last_s or now_s)), now_s
            print("token", flush=True)
        else:
            told = {"tokens": event.token_ids, "failovers": event.usage.failovers, "largest_gap_s": gap_s}
            print(json.dumps(told), flush=True)
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
    """Two namespaces on a bridge in a third, and the processes inside them. ``names``: host name -> address."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.name = f"llmc{os.getpid()}"
        self.names = dict(names or {})
        self.processes: list[subprocess.Popen[bytes]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="llmc-"))
        self._asked = ResidentCommand("ip", "netns", "exec", self.host(1))

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
            self._name_hosts(host)
        return self

    def _name_hosts(self, host: str) -> None:
        if self.names:
            folder = NAMES / host
            folder.mkdir(parents=True)
            lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.names.items())]
            (folder / "hosts").write_text("\n".join(lines) + "\n")

    def host(self, index: int) -> str:
        return f"{self.name}h{index}"

    def cut_off(self, index: int) -> None:
        self._set_link(index, "down")

    def _set_link(self, index: int, state: str) -> None:
        run("ip", "-n", f"{self.name}sw", "link", "set", f"p{index}", state)

    def run_dir(self, name: str) -> str:
        folder = self.folder / name
        folder.mkdir(mode=0o700)
        return str(folder)

    def start(self, index: int, *arguments: str) -> dict[str, object]:
        """A command of ours inside a host; its ready line. Its process is the last one of ``processes``."""
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

    def said(self, process: subprocess.Popen[bytes]) -> str:
        """What it wrote to standard error."""
        return (self.folder / f"{self.processes.index(process)}.err").read_text()

    def call(self, index: int, *arguments: str, deadline_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A command of ours inside a host, to its end."""
        command = ["ip", "netns", "exec", self.host(index), sys.executable, "-m", "cluster", *arguments]
        return subprocess.run(command, capture_output=True, timeout=deadline_s, check=False, text=True)

    def get(self, index: int, url: str) -> tuple[int, str]:
        """(status, body) of a GET from inside a host."""
        program = (
            "import sys, urllib.request, urllib.error\n"
            "try:\n    a = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=10)\n"
            "except urllib.error.HTTPError as e:\n    a = e\n"
            "print(a.status); print(a.read().decode())"
        )
        command = ["ip", "netns", "exec", self.host(index), sys.executable, "-c", program, url]
        answer = subprocess.run(command, capture_output=True, timeout=30, check=True, text=True).stdout
        status, _, body = answer.partition("\n")
        return int(status), body.strip()

    def client(self, on_token: Callable[[], object], router: str = f"{HEAD}:50051") -> dict[str, object]:
        command = ["ip", "netns", "exec", self.host(1), sys.executable, "-c", CLIENT, router, PROMPT]
        with subprocess.Popen([*command, str(MAX_TOKENS)], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.strip() != "token":
                    return json.loads(line)
                on_token()
        raise AssertionError("the stream ended without its end")

    def status(self) -> dict[str, object]:
        return json.loads(self._asked.answer(["status", "--json", "--controller", f"{HEAD}:50052"]))

    def until(self, what: Callable[[], bool], told: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
        end, pause = time.monotonic() + deadline_s, threading.Event()
        while not what():
            assert time.monotonic() < end, told()
            pause.wait(0.3)

    def until_ready(self, replicas: int) -> None:
        self.until(
            lambda: sum(r["phase"] == "READY" for r in self.status()["replicas"]) == replicas, lambda: self.status()
        )

    def pids(self, index: int) -> list[int]:
        answer = subprocess.run(
            ["ip", "netns", "pids", self.host(index)], capture_output=True, text=True, timeout=10, check=True
        )
        return [int(pid) for pid in answer.stdout.split()]

    def kill_all(self, index: int, spared: Collection[int] = ()) -> None:
        """As when a host or its container dies: every process in it at once, but those whose pids are ``spared``."""

        def others() -> list[int]:
            return [pid for pid in self.pids(index) if pid not in spared]

        for pid in others():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.until(lambda: not others(), others, 20)

    def __exit__(self, *_: object) -> None:
        for index in (1, 2):  # a controller waits for a host that is cut off until Ray gives it up, for a minute
            self._set_link(index, "up")
        self._asked.close()
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
            self.kill_all(index)
            shutil.rmtree(NAMES / self.host(index), ignore_errors=True)
        for name in (f"{self.name}sw", self.host(1), self.host(2)):
            run("ip", "netns", "del", name)
        shutil.rmtree(self.folder, ignore_errors=True)
