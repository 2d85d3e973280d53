"""The door of this room: what the controller's process calls to learn why its worker pods do not run."""

from __future__ import annotations

from cluster.domain.clock import MonotonicClock
from cluster.kube.kube_client import connect
from cluster.kube.pod_watch import PodsUnavailable, PodWatch
from cluster.telemetry.logs import get_logger


def watch_worker_pods(selector: str) -> PodWatch | None:
    """Follows the pods with these labels from now on; None, and one line in the log, where there is no API."""
    log = get_logger(selector=selector)

    def tell(why: str) -> None:
        if why:
            log.warning("worker_pods_unknown", caused_by=why)
        else:
            log.info("worker_pods_known")

    try:
        source = connect(selector)
    except PodsUnavailable as error:
        tell(str(error))
        return None
    watch = PodWatch(source, selector, MonotonicClock(), tell)
    watch.start()
    return watch
