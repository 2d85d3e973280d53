"""A real controller that waits for its nodes says what Kubernetes says of the pods that should be them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.kube.api_server import api_server
from tests.unit.kube.test_kube_client import event, kubeconfig, pod

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

SELECTOR = "app.kubernetes.io/instance=r,app.kubernetes.io/component=worker"
GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


class Waiting:
    """``llm-cluster controller`` without a device, and what it says."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        config = folder / "cluster.yaml"
        config.write_text("models: [{model: demo}]\n")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "controller", "--config", str(config), "--port", "0", "--metrics-port", "0",
             "--ray-port", "0", "--num-cpus", "0", "--run-dir", str(folder / "run"), "--worker-pods", SELECTOR],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        self.said: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.said.append(line)
                self._news.notify_all()

    def wait_until_said(self, part: str) -> str:
        with self._news:
            assert self._news.wait_for(lambda: any(part in line for line in self.said), 90), (part, self.said)
            return next(line for line in self.said if part in line)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join(10)
            assert self.process.stderr is not None
            self.process.stderr.close()


@contextmanager
def waiting(environment: dict[str, str]) -> Iterator[Waiting]:
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        controller = Waiting(Path(folder).resolve(), environment)
        try:
            yield controller
        finally:
            code = controller.end()
        assert code == 0, controller.said


def test_it_says_why_its_worker_pods_do_not_run(tmp_path: Path) -> None:
    unscheduled = pod("w-1", 8, "Pending")
    unscheduled["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "message": GPU}]
    with api_server() as (url, script):
        script.pods = [pod("w-0", 7), unscheduled]
        watch = script.watch()
        with waiting(kubeconfig(tmp_path, url, namespace="serving")) as controller:
            first = controller.wait_until_said("worker pods wait")
            assert first.startswith(
                "Waiting for nodes: There is no device to put demo on; 1 of 2 worker pods wait: w-1 "
            )
            assert first.endswith("(0/3 nodes are available: 3 Insufficient nvidia.com/gpu).\n")
            assert script.of("list")[0]["labelSelector"] == SELECTOR
            pulling = pod("w-1", 120, "Pending")
            waits = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
            pulling["status"]["containerStatuses"] = [{"state": {"waiting": waits}}]
            watch.put(event("MODIFIED", pulling))
            controller.wait_until_said("w-1 cannot pull its image (ImagePullBackOff: Back-off pulling image)")
            assert len(script.of("list")) == 1, "a change is watched, not polled"


def test_without_an_api_it_waits_as_ever() -> None:
    with waiting({"KUBECONFIG": "", "KUBERNETES_SERVICE_HOST": ""}) as controller:
        assert controller.wait_until_said("Waiting for nodes").endswith("There is no device to put demo on.\n")
