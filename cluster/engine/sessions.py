"""Routers' sessions at a leader: who wants what, and one merged message per step for each of them.

The engine never waits for a reader: what a session has not taken yet is merged into its outbox, and a session that
lets more than ``MAX_PENDING_BYTES`` pile up is reset. Messages are made when they are taken, from all that is pending:
a step's news cost a list until then.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableSequence, Sequence

from cluster.domain.endpoint import LoadSnapshot
from cluster.engine.loop import Published
from cluster.engine.step import SequenceKey, SequenceProgress
from cluster.v1 import engine_pb2
from cluster.wire.channel import MAX_MESSAGE_BYTES
from cluster.wire.convert import end_to_message, load_to_message, logprob_to_message

# Half of the largest message, so that what is pending can always be sent.
MAX_PENDING_BYTES = MAX_MESSAGE_BYTES // 2
_UPDATE_BYTES, _TOKEN_BYTES, _LOGPROB_BYTES = 32, 5, 24  # upper bounds on the wire


class Outbox:
    """One session's unsent updates, merged by sequence when they are taken. Lives on the event loop.

    ``filled``: there is something to take, updates or a beat. ``overflow``: the session is to be reset.
    """

    def __init__(self) -> None:
        self._pending: list[SequenceProgress] = []
        self._step = 0
        self._load = LoadSnapshot()
        self._pending_bytes = 0
        self._beat_due = False
        # The last message, where it held one token of each of ``_steady``, at ``_told``, and nothing else. The next one
        # mostly differs in the tokens alone, and making one anew takes as long as all else here together.
        self._message: engine_pb2.StepUpdate | None = None
        self._steady: list[tuple[SequenceKey, int, int]] = []
        self._told: list[MutableSequence[int]] = []
        self.filled = asyncio.Event()
        self.overflow = asyncio.Event()

    def put(self, step: int, progresses: Sequence[SequenceProgress], load: LoadSnapshot) -> None:
        self._pending += progresses
        self._step, self._load = step, load
        self._pending_bytes += (_UPDATE_BYTES + _TOKEN_BYTES) * len(progresses)
        for progress in progresses:
            if progress.logprobs or progress.detail or len(progress.token_ids) > 1:
                self._pending_bytes += _extra_bytes(progress)
        if self._pending_bytes > MAX_PENDING_BYTES:
            self.overflow.set()
        self.filled.set()

    def ask_for_beat(self) -> None:
        self._beat_due = True
        self.filled.set()

    def take(self) -> tuple[engine_pb2.StepUpdate | None, bool]:
        """Everything since the last call as one message, and whether a beat was asked for; when ``filled``.

        The message belongs to the outbox and changes with the next call: whoever keeps it keeps a copy.
        """
        self.filled.clear()
        beat_due, self._beat_due = self._beat_due, False
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if not pending:
            return None, beat_due
        # One token each, for whom the last message brought one token each: what decodes do, step after step.
        steady = [(key, attempt, cached) for key, attempt, ids, logprobs, end, _, cached in pending
                  if end is None and not logprobs and len(ids) == 1]  # fmt: skip
        message = self._message
        if message is not None and steady == self._steady and len(steady) == len(pending):
            for told, progress in zip(self._told, pending, strict=True):
                told[0] = progress.token_ids[0]
        else:
            message = _message_of(pending)
            alike = len(steady) == len(pending) == len(message.sequences)
            self._message = message if alike else None
            self._steady, self._told = steady, [update.token_ids for update in message.sequences]
        message.step = self._step
        message.load.CopyFrom(load_to_message(self._load))
        return message, beat_due


def _message_of(pending: Sequence[SequenceProgress]) -> engine_pb2.StepUpdate:
    """Updates merged by sequence."""
    message = engine_pb2.StepUpdate()
    # Several updates of one sequence mean that the reader lags; otherwise there is nothing to merge.
    known: dict[SequenceKey, engine_pb2.SequenceUpdate] = {}
    add = message.sequences.add
    for progress in pending:
        key, attempt, token_ids, logprobs, end, _, cached_prompt_tokens = progress
        if key in known:
            known[key].token_ids.extend(token_ids)
        else:
            known[key] = add(sequence_id=key[1], attempt=attempt, token_ids=token_ids)
        if logprobs or cached_prompt_tokens or end is not None:
            _add_rare(known[key], progress)
    return message


def _add_rare(update: engine_pb2.SequenceUpdate, progress: SequenceProgress) -> None:
    """What most updates do not have."""
    if progress.cached_prompt_tokens:
        update.cached_prompt_tokens = progress.cached_prompt_tokens
    if progress.logprobs:
        update.logprobs.extend([logprob_to_message(value) for value in progress.logprobs])
    if progress.end is not None:
        update.end = end_to_message(progress.end)
        update.detail = progress.detail


def _extra_bytes(progress: SequenceProgress) -> int:
    """Beyond an update with one token."""
    logprobs = sum(1 + len(value.top) for value in progress.logprobs)
    return _TOKEN_BYTES * len(progress.token_ids) + _LOGPROB_BYTES * logprobs + 4 * len(progress.detail)


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
        for session, mine in by_session.items():
            outbox = self._outboxes.get(session)
            if outbox is not None:  # a closed session's last updates interest nobody
                outbox.put(published.step, mine, published.load)
