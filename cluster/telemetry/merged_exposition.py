"""Adapter: the /metrics of several processes of this machine, asked for and shown as one."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from cluster.config.schema import LOOPBACK
from cluster.telemetry.merging import Series

ASK_DEADLINE_S = 1.0
ASKED_AT_ONCE = 16


class MergedProcesses(Collector):
    """A collector of everything that ``own`` and the processes show.

    A process is asked at every scrape; one that does not answer, or not with metrics, counts with its last answer. What
    a process that has ended had counted stays in the sums, for series that some other process still shows. Any thread
    may call.
    """

    def __init__(self, own: CollectorRegistry, alike: frozenset[str]) -> None:
        self._own, self._alike = own, alike
        self.registry = CollectorRegistry()  # what a MetricsServer shows
        self.registry.register(self)
        self._lock = threading.Lock()
        self._ports: dict[object, int] = {}
        self._last: dict[object, Series] = {}
        self._retired = Series()
        self._askers = ThreadPoolExecutor(ASKED_AT_ONCE, "metrics-merge")

    def join(self, key: object, port: int) -> None:
        """The process ``key`` answers on ``port`` of the loopback interface."""
        with self._lock:
            self._ports[key] = port

    def leave(self, key: object) -> None:
        """The process ``key`` has ended."""
        with self._lock:
            self._ports.pop(key, None)
            last = self._last.pop(key, None)
            if last is not None:
                self._retired.add(last.growing())
                self._retired = self._retired.only_shown_by([last, *self._last.values()])

    def refresh(self) -> frozenset[object]:
        """Asks every process now: what it has counted until then survives its death. Those that did not answer."""
        with self._lock:
            ports = dict(self._ports)
        answers = dict(zip(ports, self._askers.map(_ask, ports.values()), strict=True))
        with self._lock:
            self._last |= {
                key: found.series for key, found in answers.items() if found.series is not None and key in self._ports
            }
        return frozenset(key for key, found in answers.items() if not found.answered)

    def ready(self) -> bool:
        """Whether some process is."""
        with self._lock:
            ports = tuple(self._ports.values())
        return any(self._askers.map(_is_ready, ports))

    def collect(self) -> Iterable[Metric]:
        self.refresh()
        together = Series(self._own.collect())
        with self._lock:
            for series in self._last.values():
                together.add(series, self._alike)
            together.add_where_shown(self._retired)
        return together.families()

    def close(self) -> None:
        self._askers.shutdown(wait=False, cancel_futures=True)


class _Answer(NamedTuple):
    """``series`` is None where what came is no page of metrics."""

    answered: bool
    series: Series | None = None


def _ask(port: int) -> _Answer:
    answer = _get(port, "/metrics")
    if answer is None:
        return _Answer(answered=False)
    try:
        return _Answer(answered=True, series=Series(text_string_to_metric_families(answer[1])))
    except Exception:  # boundary: whatever one process shows, the others' count; the parser names no errors
        return _Answer(answered=True)


def _is_ready(port: int) -> bool:
    answer = _get(port, "/readyz")
    return answer is not None and answer[0] == http.client.OK


def _get(port: int, path: str) -> tuple[int, str] | None:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=ASK_DEADLINE_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
