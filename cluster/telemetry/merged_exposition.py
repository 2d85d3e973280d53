"""Adapter: the /metrics of several processes of this machine, asked for and shown as one."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from cluster.config.schema import LOOPBACK
from cluster.domain.clock import Clock, MonotonicClock
from cluster.telemetry.exposition import Page
from cluster.telemetry.logs import get_logger
from cluster.telemetry.merging import Series

READY_DEADLINE_S = 1.0
# /healthz is a few bytes, but a process that is busy gives the thread that answers its turns late.
ALIVE_DEADLINE_S = 3.0
# A page of metrics takes as long as it is large: seconds with ten thousand replicas. A scrape waits for some times what
# the last one took, and then shows that; in the background there is nobody who waits.
SCRAPE_FIRST_S, SCRAPE_LEAST_S, SCRAPE_MOST_S, SCRAPE_TIMES = 2.0, 1.0, 8.0, 4.0
REFRESH_DEADLINE_S = 30.0
ASKED_AT_ONCE = 16


class MergedProcesses:
    """Everything that ``own`` and the processes show, on one page.

    A process is asked at every scrape; one that does not answer in time, or not with metrics, counts with its last
    answer. What a process that has ended had counted stays in the sums, for series that some other process still
    shows. Any thread may call.
    """

    def __init__(self, own: CollectorRegistry, alike: frozenset[str], clock: Clock | None = None) -> None:
        self._own, self._alike, self._clock = own, alike, clock or MonotonicClock()
        self._log = get_logger(component="merged_metrics")
        self._lock = threading.Lock()  # held for moments only: pages are merged outside
        self._leaving = threading.Lock()
        self._ports: dict[object, int] = {}
        self._last: dict[object, _Answer] = {}
        self._retired = Series()
        # Two of them: whether a process lives is not to wait for pages of metrics.
        self._askers = ThreadPoolExecutor(ASKED_AT_ONCE, "metrics-merge")
        self._callers = ThreadPoolExecutor(ASKED_AT_ONCE, "roll-call")

    def join(self, key: object, port: int) -> None:
        """The process ``key`` answers on ``port`` of the loopback interface."""
        with self._lock:
            self._ports[key] = port

    def leave(self, key: object) -> None:
        """The process ``key`` has ended; what it had counted is shown throughout. Blocks where pages are large."""
        with self._leaving:
            with self._lock:
                self._ports.pop(key, None)
                last, others = self._last.get(key), [a.series for k, a in self._last.items() if k != key]
            if last is None:
                return
            retired = self._retired.copy()
            retired.add(last.series.growing())
            retired = retired.only_shown_by([last.series, *others])
            with self._lock:
                del self._last[key]
                self._retired = retired

    def refresh(self) -> None:
        """Asks every process now, with patience: what it has counted until then survives its death."""
        self._ask_all(lambda _: REFRESH_DEADLINE_S)

    def silent(self) -> frozenset[object]:
        """Those that do not say in time that they are alive (/healthz)."""
        ports = self._known()
        answers = self._callers.map(partial(_is_ok, path="/healthz", limit_s=ALIVE_DEADLINE_S), ports.values())
        return frozenset(key for key, alive in zip(ports, answers, strict=True) if not alive)

    def ready(self) -> bool:
        """Whether some process is."""
        ports = self._known().values()
        return any(self._callers.map(partial(_is_ok, path="/readyz", limit_s=READY_DEADLINE_S), ports))

    def page(self) -> Page:
        """What a MetricsServer shows at /metrics."""
        self._ask_all(_scrape_limit_s)
        together = Series(generate_latest(self._own).decode())
        with self._lock:
            answers, retired = list(self._last.values()), self._retired
        for answer in answers:
            together.add(answer.series, self._alike)
        together.add_where_shown(retired)
        return Page(http.client.OK, together.page().encode(), CONTENT_TYPE_PLAIN_0_0_4)

    def close(self) -> None:
        self._askers.shutdown(wait=False, cancel_futures=True)
        self._callers.shutdown(wait=False, cancel_futures=True)

    def _known(self) -> dict[object, int]:
        with self._lock:
            return dict(self._ports)

    def _ask_all(self, limit_s: Callable[[_Answer | None], float]) -> None:
        ports = self._known()
        with self._lock:
            limits = [limit_s(self._last.get(key)) for key in ports]
        for _ in self._askers.map(self._ask, ports, ports.values(), limits):
            continue

    def _ask(self, key: object, port: int, limit_s: float) -> None:
        asked_s = self._clock.now()
        page = _get(port, "/metrics", limit_s)
        if page is None:
            return
        took_s = self._clock.now() - asked_s
        try:
            series = Series(page[1])
        except ValueError as error:
            self._log.warning("process_metrics_unreadable", port=port, caused_by=str(error))
            return
        with self._lock:
            last = self._last.get(key)
            # Not what comes behind a younger answer, and not what the predecessor of a new process said.
            if self._ports.get(key) == port and (last is None or last.asked_s <= asked_s):
                self._last[key] = _Answer(series, asked_s, took_s)


class _Answer(NamedTuple):
    """What a process showed when it was asked at ``asked_s``, ``took_s`` later."""

    series: Series
    asked_s: float
    took_s: float


def _scrape_limit_s(last: _Answer | None) -> float:
    if last is None:
        return SCRAPE_FIRST_S
    return min(max(SCRAPE_LEAST_S, SCRAPE_TIMES * last.took_s), SCRAPE_MOST_S)


def _is_ok(port: int, path: str, limit_s: float) -> bool:
    answer = _get(port, path, limit_s)
    return answer is not None and answer[0] == http.client.OK


def _get(port: int, path: str, limit_s: float) -> tuple[int, str] | None:
    """``limit_s``: for each step, that is for the first byte and for every further piece."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=limit_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
