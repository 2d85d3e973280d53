"""Whether a task is asked to end: grpc.aio now and then answers a cancelled read with its own error instead."""

from __future__ import annotations

import asyncio


def being_cancelled() -> bool:
    """True once somebody cancelled this very task, even when a library swallowed the CancelledError."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
