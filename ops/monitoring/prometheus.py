"""A Prometheus of our own on loopback, and its HTTP API."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ops.monitoring.rules import ROOT

LOOPBACK = "127.0.0.1"
JOB = "llm-cluster"
READY_DEADLINE_S = 30.0
CALL_DEADLINE_S = 20.0
END_DEADLINE_S = 10.0
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class MonitorError(RuntimeError):
    """It cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of an answer: its labels, and (time, value) without the NaN."""

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


def binary() -> str:
    """The path of Debian's prometheus; MonitorError when there is none."""
    done = subprocess.run(
        [ROOT / "ops" / "debian-tool", "prometheus", "prometheus"], capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise MonitorError(done.stderr.strip())
    return done.stdout.strip()


def configuration(targets_url: str, interval_s: int, rule_files: Sequence[Path]) -> str:
    """What a Prometheus outside Kubernetes needs; docs/operating.md shows the same."""
    scrape = {
        "job_name": JOB,
        "honor_labels": True,
        "http_sd_configs": [{"url": targets_url, "refresh_interval": f"{interval_s}s"}],
    }
    every = f"{interval_s}s"
    return yaml.safe_dump(
        {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": [str(path) for path in rule_files],
            "scrape_configs": [scrape],
        },
        sort_keys=False,
    )


class Prometheus:
    """A running one (``program``: its path). ``end`` ends it; what it stored lies under ``folder``."""

    def __init__(self, program: str, folder: Path, config: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prometheus.yml").write_text(config)
        self.port = _free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._log = folder / "prometheus.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    program,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={LOOPBACK}:{self.port}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for whoever ends it
            )

    def wait_ready(self) -> None:
        pause, until_s = threading.Event(), time.monotonic() + READY_DEADLINE_S
        while time.monotonic() < until_s and self.process.poll() is None:
            try:
                with _open(f"{self.url}/-/ready", timeout=2):
                    return
            except OSError:
                pause.wait(0.1)
        raise MonitorError(f"Prometheus is not ready: {self._log.read_text().strip() or 'it said nothing'}")

    def query_range(self, expr: str, start_s: float, end_s: float, step_s: float) -> list[Series]:
        answer = self.ask("query_range", query=expr, start=start_s, end=end_s, step=step_s)
        return [_series(found["metric"], found["values"]) for found in answer["result"]]

    def label_values(self, query: str) -> list[str]:
        """The answer to Grafana's own ``label_values(SELECTOR, LABEL)``."""
        selector, _, label = query.removeprefix("label_values(").removesuffix(")").rpartition(",")
        values: list[str] = self.ask(f"label/{label.strip()}/values", **{"match[]": selector})
        return values

    def ask(self, what: str, **parameters: object) -> Any:
        """One call of the API; MonitorError with Prometheus's own words."""
        data = urllib.parse.urlencode(parameters)
        is_get = what.startswith(("label/", "targets", "rules"))
        url = f"{self.url}/api/v1/{what}" + (f"?{data}" if is_get else "")
        try:
            with _open(url, None if is_get else data.encode(), timeout=CALL_DEADLINE_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                words = json.loads(error.read().decode()).get("error", str(error))
            raise MonitorError(f"{words} ({parameters})") from None

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_DEADLINE_S)


def _series(labels: Mapping[str, str], values: Sequence[tuple[float, str]]) -> Series:
    points = ((at, float(value)) for at, value in values)
    return Series(labels, tuple((at, value) for at, value in points if value == value))  # noqa: PLR0124 - NaN is not


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        port: int = server.getsockname()[1]
    return port
