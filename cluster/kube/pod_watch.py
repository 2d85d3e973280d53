"""Follows the worker pods in a thread of its own: one list, then watches that each go on where the last ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cluster.domain.clock import Clock
from cluster.kube.pods import PodState, why_pods_wait

RETRY_S = 1.0
RETRY_MAX_S = 60.0
# What was seen before the API fell silent is not told for longer than this.
STALE_S = 120.0
CLOSE_PAUSE_S, CLOSE_TRIES = 0.05, 200


class PodsUnavailable(Exception):  # noqa: N818 - a state of the API, which passes
    """The API does not answer, or refuses; the message is one sentence."""


class VersionGone(PodsUnavailable):
    """The version to watch from is too old: list again."""


@dataclass(frozen=True, slots=True)
class PodList:
    """Every pod now; ``version``: where a watch goes on from."""

    pods: tuple[PodState, ...]
    version: str


@dataclass(frozen=True, slots=True)
class PodEvent:
    """A pod that is there (``pod``), one that is gone (``gone``), or neither: only the version moved."""

    version: str
    pod: PodState | None = None
    gone: str = ""


class PodSource(Protocol):
    """The Kubernetes API. Every call is bounded in time and raises PodsUnavailable."""

    def list_pods(self) -> PodList: ...

    def watch_pods(self, version: str) -> Iterator[PodEvent]:
        """What happened after ``version``; ends by itself after a while. VersionGone when that is too long ago."""

    def close(self) -> None:
        """Ends the watch that runs, if there is one."""


class PodWatch:
    """Implements the controller's ``NodeOutlook``: ``reason`` reads memory only and never fails.

    ``tell(event, text)`` hears of every change between reachable ("") and not. Start it once.
    """

    def __init__(self, source: PodSource, selector: str, clock: Clock, tell: Callable[[str], None]) -> None:
        self._source, self._selector, self._clock, self._tell = source, selector, clock, tell
        self._lock = threading.Lock()
        self._pods: dict[str, PodState] | None = None
        self._known_at_s = 0.0
        self._trouble = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker-pods", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reason(self) -> str:
        """Why worker pods do not run; "" when they do, or nothing is known."""
        with self._lock:
            old = self._trouble and self._clock.now() - self._known_at_s > STALE_S
            if self._pods is None or old:
                return ""
            return why_pods_wait(self._pods.values(), self._selector)

    def close(self) -> None:
        self._closing.set()
        for _ in range(CLOSE_TRIES):
            self._source.close()  # again, for a watch may begin just now
            self._thread.join(CLOSE_PAUSE_S)
            if not self._thread.is_alive():
                return

    def _run(self) -> None:
        pause_s, version = RETRY_S, ""
        while not self._closing.is_set():
            try:
                version = version or self._list()
                for event in self._source.watch_pods(version):
                    version = self._take(event)
                    pause_s = RETRY_S
                self._works()
                pause_s = RETRY_S
            except VersionGone:
                version = ""
            except PodsUnavailable as error:
                self._fails(str(error))
                version = ""  # only a list says at once that it answers again; a watch may be silent for minutes
            except Exception as error:  # boundary: a bug in what only explains must not end it for ever
                self._fails(f"reading pods broke: {error!r}")
                version = ""
            # After every end, so that a server that ends each watch at once stays cheap.
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    def _list(self) -> str:
        found = self._source.list_pods()
        with self._lock:
            self._pods = {pod.name: pod for pod in found.pods}
        self._works()
        return found.version

    def _take(self, event: PodEvent) -> str:
        with self._lock:
            assert self._pods is not None, "an event before the first list"
            if event.pod is not None:
                self._pods[event.pod.name] = event.pod
            elif event.gone:
                self._pods.pop(event.gone, None)
        self._works()
        return event.version

    def _works(self) -> None:
        with self._lock:
            self._known_at_s = self._clock.now()
            changed, self._trouble = bool(self._trouble), ""
        if changed:
            self._tell("")

    def _fails(self, why: str) -> None:
        if self._closing.is_set():
            return
        with self._lock:
            changed, self._trouble = why != self._trouble, why
        if changed:
            self._tell(why)
