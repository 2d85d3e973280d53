"""One of several router processes, as its parent starts it: ``python -m cluster.router.one_process``."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import structlog

from cluster.domain.errors import ClusterError
from cluster.router.process_order import ProcessAnswer, ProcessOrder
from cluster.router.service import OneOfSeveral, RunningRouter, run_router
from cluster.telemetry.logs import configure_logs


def main() -> int:
    """Serves until SIGTERM; leaves the port and drains when the parent has ended."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return 0  # the parent ended first
    order = ProcessOrder.from_line(line)
    configure_logs("router", Path(order.log_file) if order.log_file else None)
    structlog.contextvars.bind_contextvars(index=order.index)

    def started(router: RunningRouter) -> None:
        loop = asyncio.get_running_loop()

        def follow_parent() -> None:
            while os.read(sys.stdin.fileno(), 1):  # unbuffered: nothing is locked when the interpreter ends
                continue
            with suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(router.leave_port)

        threading.Thread(target=follow_parent, name="parent", daemon=True).start()
        _answer(ProcessAnswer(router.pid, router.ports))

    try:
        return run_router(
            order.config,
            order.controller_address,
            state_file=Path(order.state_file) if order.state_file else None,
            started=started,
            one_of=OneOfSeveral(order.ready_wait_s),
        )
    except ClusterError as error:
        _answer(ProcessAnswer(os.getpid(), {}, str(error)))
        return 1


def _answer(answer: ProcessAnswer) -> None:
    sys.stdout.write(answer.to_line())
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
