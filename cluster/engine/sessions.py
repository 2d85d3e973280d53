"""Routers' sessions at a leader: who wants what, and one merged message per step for each of them.

The engine never waits for a reader: what a session has not taken yet is merged into its outbox, and a session that
lets more than ``MAX_PENDING_BYTES`` pile up is reset.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from cluster.engine.loop import Published
from cluster.engine.step import SequenceProgress
from cluster.v1 import engine_pb2
from cluster.wire.channel import MAX_MESSAGE_BYTES
from cluster.wire.convert import end_to_message, load_to_message, logprob_to_message

# Half of the largest message, so that what is pending can always be sent.
MAX_PENDING_BYTES = MAX_MESSAGE_BYTES // 2
_UPDATE_BYTES, _TOKEN_BYTES, _LOGPROB_BYTES = 32, 5, 24  # upper bounds on the wire


class Outbox:
    """One session's unsent updates, merged by sequence. Lives on the event loop."""

    def __init__(self) -> None:
        self._updates: dict[tuple[int, int], engine_pb2.SequenceUpdate] = {}
        self._latest: engine_pb2.StepUpdate | None = None
        self._pending_bytes = 0
        self._filled = asyncio.Event()
        self.overflow = asyncio.Event()

    def put(self, step: int, progresses: Iterable[SequenceProgress], load: engine_pb2.Load) -> None:
        for progress in progresses:
            self._merge(progress)
        self._latest = engine_pb2.StepUpdate(step=step, load=load)
        if self._pending_bytes > MAX_PENDING_BYTES:
            self.overflow.set()
        self._filled.set()

    def _merge(self, progress: SequenceProgress) -> None:
        key = (progress.key.sequence_id, progress.attempt)
        update = self._updates.get(key)
        if update is None:
            update = self._updates[key] = engine_pb2.SequenceUpdate(
                sequence_id=progress.key.sequence_id, attempt=progress.attempt
            )
        update.token_ids.extend(progress.token_ids)
        update.logprobs.extend(logprob_to_message(value) for value in progress.logprobs)
        update.end = end_to_message(progress.end)
        update.detail = progress.detail
        update.cached_prompt_tokens = progress.cached_prompt_tokens
        logprobs = sum(1 + len(value.top) for value in progress.logprobs)
        self._pending_bytes += _UPDATE_BYTES + len(progress.detail) * 4
        self._pending_bytes += _TOKEN_BYTES * len(progress.token_ids) + _LOGPROB_BYTES * logprobs

    async def take(self) -> engine_pb2.StepUpdate:
        """Everything since the last call, as one message; waits until there is something."""
        await self._filled.wait()
        self._filled.clear()
        message = self._latest
        assert message is not None
        message.sequences.extend(self._updates.values())
        self._updates, self._pending_bytes = {}, 0
        return message


class Sessions:
    """All open sessions. ``deliver`` is called on the event loop, once per step."""

    def __init__(self) -> None:
        self._outboxes: dict[int, Outbox] = {}
        self._next = 1

    def open(self) -> tuple[int, Outbox]:
        session, outbox = self._next, Outbox()
        self._next += 1
        self._outboxes[session] = outbox
        return session, outbox

    def close(self, session: int) -> None:
        self._outboxes.pop(session, None)

    def deliver(self, published: Published) -> None:
        by_session: dict[int, list[SequenceProgress]] = {}
        for progress in published.progresses:
            by_session.setdefault(progress.key.session, []).append(progress)
        load = load_to_message(published.load)
        for session, progresses in by_session.items():
            outbox = self._outboxes.get(session)
            if outbox is not None:  # a closed session's last updates interest nobody
                outbox.put(published.step, progresses, load)
