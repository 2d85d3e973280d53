"""Runs built images as the chart's pods run them: their user, no capability, a read-only root, tmpfs where they write.

All of them share one network namespace without a way out; each has its own processes and its own /dev/shm.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ops.docker.building import Built, say
from ops.docker.roots import Mounts, ProofError, as_user, enter, remove_points

CONTROLLER, WORKER, ROUTER = "10.77.0.1", "10.77.0.2", "10.77.0.3"
RUN_DIR = "/var/lib/llm-cluster/c"
TOKEN = "/var/run/secrets/llm-cluster/token"
CONFIG = "/etc/llm-cluster/cluster.yaml"
COMMAND_DEADLINE_S = 90
ANSWER_DEADLINE_S = 240
STOP_DEADLINE_S = 90
_CLUSTER = """\
cluster_name: proof
models: [{model: demo, replicas: 1, tensor_parallel_size: 2, kv_cache_bytes: 67108864}]
controller: {drain_deadline_s: 5}
router: {drain_deadline_s: 5}
"""


@dataclass
class Container:
    """A running image. ``mount_points``: what was made in its root to mount on."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    mount_points: list[Path]

    def first_process(self) -> psutil.Process:
        """Process 1 of the container, seen from here."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def zombies(self) -> list[str]:
        below = self.first_process().children(recursive=True)
        return [process.name() for process in below if process.status() == psutil.STATUS_ZOMBIE]

    def written(self, folder: str) -> list[str]:
        """What lies directly in ``folder`` of the running container."""
        return sorted(path.name for path in Path(f"/proc/{self.first_process().pid}/root{folder}").iterdir())

    def stop(self) -> int:
        """Its exit code after its stop signal."""
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            self.first_process().send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise ProofError(f"{self.name} did not end within {STOP_DEADLINE_S} s of its stop signal.") from error

    def end(self) -> None:
        """Whatever is left of it; its namespaces go with it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        remove_points(self.mount_points)


class Site:
    """A network of its own, with the files that pods get from a ConfigMap and a Secret."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "cluster.yaml").write_text(_CLUSTER)
        (folder / "token").write_text(secrets.token_hex(32))
        self._network: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        addresses = " && ".join(f"ip address add {host}/32 dev lo" for host in (CONTROLLER, WORKER, ROUTER))
        script = f"ip link set lo up && {addresses} && echo up && exec sleep infinity"
        self._network = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        try:
            assert self._network.stdout is not None
            if self._network.stdout.readline().strip() != b"up":
                raise ProofError("A network namespace cannot be made (iproute2 is needed).")
            yield
        finally:
            self._network.kill()
            self._network.wait()

    def command(self, built: Built, arguments: Sequence[str]) -> tuple[list[str], Mounts]:
        """The whole command line of a container of ``built``, and its mounts."""
        assert self._network is not None
        volumes = {"/tmp": "mode=1777", "/var/lib/llm-cluster": "mode=2777,gid=10001"}
        shown = {self.folder / "cluster.yaml": CONFIG, self.folder / "token": "/run/secrets/llm-cluster/token"}
        mounts = Mounts(read_only=shown, memory=volumes)
        image = built.image
        variables = [f"{name}={value}" for name, value in image.env.items()]
        own = ["env", "-i", "-C", image.workdir, *variables, *image.entrypoint, *(arguments or image.command)]
        entered = enter(built.root, as_user(image.user, own), mounts, read_only=True)
        return ["nsenter", f"--net=/proc/{self._network.pid}/ns/net", *entered], mounts

    def start(self, name: str, built: Built, *arguments: str) -> Container:
        say(f"{name}: {' '.join(arguments)}")
        log = self.folder / f"{name}.log"
        command, mounts = self.command(built, arguments)
        points = mounts.place(built.root)
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        return Container(name, process, log, points)

    def run(self, built: Built, *arguments: str) -> subprocess.CompletedProcess[str]:
        command, mounts = self.command(built, arguments)
        points = mounts.place(built.root)
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ProofError(
                f"{built.stage.name}: {' '.join(arguments)} ran longer than {COMMAND_DEADLINE_S} s."
            ) from error
        finally:
            remove_points(points)


def check_commands(site: Site, built: Built) -> None:
    """The image's program runs and finds itself fit for its role; ProofError otherwise."""
    for arguments in (("--version",), ("doctor", "--role", built.stage.name), ("generate", "--help")):
        done = site.run(built, *arguments)
        said = f"{built.stage.name}: llm-cluster {' '.join(arguments)}"
        if done.returncode != 0:
            raise ProofError(f"{said} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        lines = [line for line in done.stdout.splitlines() if any(map(str.isalnum, line))]
        say(f"{said}: {lines[-1]}")


def serve_demo(site: Site, controller: Built, worker: Built, router: Built) -> dict[str, object]:
    """One completion of the demo model through three containers, and what was seen of them."""
    joined = ("--token-file", TOKEN, "--run-dir", RUN_DIR)
    pods: list[Container] = []
    started = time.monotonic()
    try:
        pods.append(site.start(
            "controller", controller, "controller", "--config", CONFIG, "--host", CONTROLLER, "--ray-port", "6379",
            "--num-cpus", "0", *joined,
        ))  # fmt: skip
        _await(pods[-1], b'"kind": "controller"')
        pods.append(site.start(
            "worker", worker, "worker", "--address", f"{CONTROLLER}:6379", "--host", WORKER, "--num-cpus", "2",
            "--metrics-port", "9100", *joined,
        ))  # fmt: skip
        pods.append(site.start(
            "router", router, "router", "--controller", f"{CONTROLLER}:50052", "--config", CONFIG, "--host", ROUTER,
            "--run-dir", RUN_DIR,
        ))  # fmt: skip
        text = _ask(site, router, pods)
        seen = {
            "answer": text,
            "seconds": round(time.monotonic() - started, 1),
            "shared_memory_op_loaded": any(_maps_the_op(process) for process in _all(pods[1])),
            "zombies": {pod.name: pod.zombies() for pod in pods},
            "written_to_tmp": {pod.name: pod.written("/tmp") for pod in pods},
            "written_to_run_dir": {pod.name: pod.written(RUN_DIR) for pod in pods},
        }
        seen["exit_codes"] = {pod.name: pod.stop() for pod in reversed(pods)}
        return seen
    finally:
        for pod in reversed(pods):
            pod.end()


def _ask(site: Site, router: Built, pods: Sequence[Container]) -> str:
    deadline = time.monotonic() + ANSWER_DEADLINE_S
    arguments = ("generate", "Return the ", "--address", f"{ROUTER}:50051", "--max-tokens", "8", "--timeout", "30")
    while True:
        done = site.run(router, *arguments)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
        _check_running(pods)
        if time.monotonic() > deadline:
            raise ProofError(f"No answer within {ANSWER_DEADLINE_S} s: {done.stderr.strip()}\n{_tails(pods)}")
        time.sleep(1.0)


def _await(pod: Container, line: bytes) -> None:
    deadline = time.monotonic() + COMMAND_DEADLINE_S
    while line not in pod.log.read_bytes():
        _check_running([pod])
        if time.monotonic() > deadline:
            raise ProofError(f"{pod.name} was not ready within {COMMAND_DEADLINE_S} s.\n{_tails([pod])}")
        time.sleep(0.2)


def _check_running(pods: Sequence[Container]) -> None:
    for pod in pods:
        if pod.process.poll() is not None:
            raise ProofError(f"{pod.name} has ended (exit code {pod.process.returncode}).\n{_tails([pod])}")


def _tails(pods: Sequence[Container]) -> str:
    return "\n".join(f"--- {pod.name}\n{pod.log.read_text(errors='replace')[-2000:]}" for pod in pods)


def _all(pod: Container) -> list[psutil.Process]:
    first = pod.first_process()
    return [first, *first.children(recursive=True)]


def _maps_the_op(process: psutil.Process) -> bool:
    try:
        return "deepspeed_shm_comm.so" in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False
