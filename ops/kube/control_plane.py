"""A Kubernetes control plane on this machine's loopback: etcd, kube-apiserver and kube-controller-manager.

Real API, real controllers, and no node: pods are created, and nothing runs them. RBAC and the admission of service
accounts are on. Everything lives in a temporary folder and on free ports, and ends by process id.
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
READY_DEADLINE_S = 90
STOP_DEADLINE_S = 20
CANNOT_BE_HAD = 3  # exit status of ops/kube/build and ops/debian-tool


class UnavailableError(Exception):
    """No control plane can be had on this machine; the message is one sentence that says why."""


def output_of(*command: str | Path) -> str:
    """The one line that one of our scripts prints, or `UnavailableError` with the one that it gives as reason."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode == CANNOT_BE_HAD:
        raise UnavailableError(done.stderr.strip().splitlines()[-1])
    done.check_returncode()
    return done.stdout.strip()


def free_ports(count: int) -> list[int]:
    """Held together while they are chosen, so that no two are the same."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class ControlPlane:
    """A running control plane: ``with ControlPlane() as plane``, then ``plane.kubeconfig``.

    Entering builds Kubernetes if it is not built (minutes, see ops/kube/build), unless ``build`` is false; raises
    `UnavailableError` where that cannot be. Leaving ends every process and removes every file.
    """

    def __init__(self, *, build: bool = True) -> None:
        self._build = build
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._tls: ssl.SSLContext | None = None
        self._token = secrets.token_hex(16)
        self.folder = Path()
        self.server = ""

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    @property
    def pids(self) -> list[int]:
        return [process.pid for _, process in self._processes]

    def __enter__(self) -> ControlPlane:
        programs = Path(output_of(ROOT / "ops/kube/build", *(() if self._build else ("--print",))))
        etcd = output_of(ROOT / "ops/debian-tool", "etcd-server", "etcd")
        self.folder = Path(tempfile.mkdtemp(prefix="llm-cluster-kube-"))
        try:
            self._start(programs, etcd)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, programs: Path, etcd: str) -> None:
        store, peer, api, controllers = free_ports(4)
        self.server = f"https://127.0.0.1:{api}"
        self._start_etcd(etcd, f"http://127.0.0.1:{store}", f"http://127.0.0.1:{peer}")
        self._until_answers(f"http://127.0.0.1:{store}/health", "etcd")
        self._start_api(programs / "kube-apiserver", f"http://127.0.0.1:{store}", api)
        certificate = self.folder / "certs/apiserver.crt"
        self._until(certificate.exists, "kube-apiserver")
        self._tls = ssl.create_default_context(cafile=str(certificate))
        # Self-signed, so it vouches for itself; what a client checks is that it is this very certificate.
        self._tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self._write_kubeconfig(certificate)
        self._until_answers(f"{self.server}/readyz", "kube-apiserver")
        self._start_controllers(programs / "kube-controller-manager", certificate, controllers)
        # Pods can be made as soon as namespaces get their service accounts.
        self._until_answers(f"{self.server}/api/v1/namespaces/default/serviceaccounts/default", "controller-manager")

    def _start_etcd(self, program: str, client: str, peer: str) -> None:
        self._run(
            "etcd", program, f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", "--log-level=error",
            f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
        )  # fmt: skip

    def _start_api(self, program: Path, store: str, port: int) -> None:
        key = self.folder / "service-accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        tokens = self.folder / "tokens.csv"
        tokens.touch(mode=0o600)
        tokens.write_text(f'{self._token},administrator,1,"system:masters"\n')
        self._run(
            "kube-apiserver", str(program), f"--etcd-servers={store}", f"--secure-port={port}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none",
            f"--cert-dir={self.folder}/certs", "--authorization-mode=RBAC", f"--token-auth-file={tokens}",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-signing-key-file={key}",
            f"--service-account-key-file={key}", "--service-cluster-ip-range=10.96.0.0/16",
            "--enable-priority-and-fairness=false",
        )  # fmt: skip

    def _start_controllers(self, program: Path, certificate: Path, port: int) -> None:
        self._run(
            "kube-controller-manager", str(program), f"--kubeconfig={self.kubeconfig}", "--leader-elect=false",
            "--bind-address=127.0.0.1", f"--secure-port={port}", "--port=0", f"--cert-dir={self.folder}/certs-kcm",
            f"--service-account-private-key-file={self.folder}/service-accounts.key",
            f"--root-ca-file={certificate}", "--use-service-account-credentials=true",
            "--horizontal-pod-autoscaler-sync-period=1s",
        )  # fmt: skip

    def _run(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            # Should this process be killed, the kernel ends them.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append((name, process))

    def _write_kubeconfig(self, certificate: Path) -> None:
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "local", "cluster": {"server": self.server, "certificate-authority": str(certificate)}}
            ],
            "users": [{"name": "administrator", "user": {"token": self._token}}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": "administrator"}}],
            "current-context": "local",
        }
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(json.dumps(content, indent=1))  # every JSON is YAML

    def _until_answers(self, url: str, name: str) -> None:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self._token}"})

        def answers() -> bool:
            try:
                with urllib.request.urlopen(request, timeout=5, context=self._tls):
                    return True
            except (urllib.error.URLError, OSError):
                return False

        self._until(answers, name)

    def _until(self, what: Callable[[], bool], name: str) -> None:
        end, pause = time.monotonic() + READY_DEADLINE_S, threading.Event()
        while not what():
            died = [other for other, process in self._processes if process.poll() is not None]
            if died or time.monotonic() > end:
                culprit = died[0] if died else name
                said = (self.folder / f"{culprit}.log").read_text(errors="replace").splitlines()[-5:]
                raise RuntimeError(
                    f"{culprit} {'ended' if died else 'was not ready'} while the control plane started: {said}"
                )
            pause.wait(0.2)  # each look is a TLS handshake with a server that has enough to do

    def __exit__(self, *_: object) -> None:
        # Controllers first, the store last: nobody is left waiting for another.
        for _, process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_DEADLINE_S)
        self._processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> int:
    """In the foreground until Ctrl-C (or SIGTERM)."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    started = time.monotonic()
    try:
        with ControlPlane() as plane:
            print(f"ready after {time.monotonic() - started:.1f} s; Ctrl-C ends it and removes everything")
            print(f"export KUBECONFIG={plane.kubeconfig}", flush=True)
            ended.wait()
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return CANNOT_BE_HAD
    return 0


if __name__ == "__main__":
    sys.exit(main())
