"""Routers' sessions at a leader: who wants what, and one merged message per step for each of them.

The engine never waits for a reader: what a session has not taken yet is merged into its outbox, and a session that
lets more than ``MAX_PENDING_BYTES`` pile up is reset. Messages are made when they are taken, from all that is pending:
a step's news cost a list until then. Where a reader keeps up, they are taken in the turn of the event loop that
brings them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Container, MutableSequence, Sequence

from cluster.domain.endpoint import LoadSnapshot
from cluster.engine.block_events import BlockLog, BlockReader
from cluster.engine.load_news import LoadNews
from cluster.engine.loop import Published
from cluster.engine.step import SequenceKey, SequenceProgress
from cluster.v1 import engine_pb2
from cluster.wire.channel import MAX_MESSAGE_BYTES
from cluster.wire.convert import end_to_message, load_to_message, logprob_to_message

# Half of the largest message, so that what is pending can always be sent.
MAX_PENDING_BYTES = MAX_MESSAGE_BYTES // 2
# News of blocks are gathered for so long: a message of their own for each step would cost as much as the step's. A
# router may ask for longer pauses, up to a bound: what it knows would be worth little.
TELL_BLOCKS_S = 0.1
MAX_TELL_BLOCKS_S = 10.0
TELL_LOADS_S = 0.01  # after which those are looked at again who could not be told at once
_UPDATE_BYTES, _TOKEN_BYTES, _LOGPROB_BYTES = 32, 5, 24  # upper bounds on the wire


class Outbox:
    """One session's unsent updates, merged by sequence when they are taken. Lives on the event loop.

    ``on_news`` is called when there is something to take, with all that belongs together. ``overflow``: the session is
    to be reset. ``blocks``: where its router wants news of blocks, and they are at hand; ``pause_s``: at least, between
    two of them. ``load_pause_s``: on average, between two messages that tell the load alone; None: it wants none.
    """

    def __init__(
        self, blocks: BlockReader | None = None, pause_s: float = 0.0, load_pause_s: float | None = None
    ) -> None:
        self._load_news, self._load_due = LoadNews(load_pause_s), False
        self._blocks, self._blocks_due = blocks, False
        self._pause_s, self._told_blocks_s = min(pause_s, MAX_TELL_BLOCKS_S), -math.inf
        self._pending: list[SequenceProgress] = []
        self._step = 0
        self._load = LoadSnapshot()
        self._pending_bytes = 0
        self._beat_due = False
        # The last message, where it held one token of each of ``_steady``, at ``_told``, and nothing else. The next one
        # mostly differs in the tokens alone, and making one anew takes as long as all else here together.
        self._message: engine_pb2.SessionResponse | None = None
        self._steady: list[tuple[SequenceKey, int, int]] = []
        self._told: list[MutableSequence[int]] = []
        self.on_news: Callable[[], None] = lambda: None
        self.overflow = asyncio.Event()

    def put(self, step: int, progresses: Sequence[SequenceProgress], load: LoadSnapshot) -> None:
        self._pending += progresses
        self._step, self._load = step, load
        self._load_news.told()
        self._pending_bytes += (_UPDATE_BYTES + _TOKEN_BYTES) * len(progresses)
        for progress in progresses:
            if progress.logprobs or progress.detail or len(progress.token_ids) > 1:
                self._pending_bytes += _extra_bytes(progress)
        if self._pending_bytes > MAX_PENDING_BYTES:
            self.overflow.set()
        self.on_news()

    def refuse(self, step: int, refused: Sequence[SequenceProgress], load: LoadSnapshot) -> None:
        """Sequences that no step has seen; tokens that wait keep the number of theirs."""
        self.put(self._step if self._pending else step, refused, load)

    def ask_for_beat(self) -> None:
        self._beat_due = True
        self.on_news()

    def take_beat(self) -> bool:
        """Whether one was asked for since the last call."""
        beat_due, self._beat_due = self._beat_due, False
        return beat_due

    def load_changed(self, step: int, load: LoadSnapshot, now_s: float) -> bool:
        """A message tells it, unless there were many of late. False: later, when somebody asks for it again."""
        if self._load_news.changed(now_s):
            if not self._pending:  # tokens keep the number of their own step: who gets them measures it
                self._step = step
            self._load, self._load_due = load, True
            self.on_news()
        return not self._load_news.late

    @property
    def load_is_late(self) -> bool:
        return self._load_news.late

    def pace(self, pause_s: float, load_pause_s: float) -> None:
        """Other pauses from now on, also for what waits already."""
        self._pause_s = min(pause_s, MAX_TELL_BLOCKS_S)
        self._load_news.pace(load_pause_s)

    def tell_blocks(self, now_s: float) -> bool:
        """News of blocks may go now. False: there are some, and it is too early for this session."""
        if self._blocks is None or not self._blocks.behind:
            return True
        if now_s < self._told_blocks_s + self._pause_s:
            return False
        self._told_blocks_s = now_s
        self._go_on_with_blocks()
        return True

    def resync_blocks(self) -> None:
        """The router has missed some: it gets a full account."""
        if self._blocks is not None:
            self._blocks.restart()
            self._go_on_with_blocks()

    def take_blocks(self) -> engine_pb2.BlockEvents | None:
        """The next message about blocks, if one is due; for when nothing else waits."""
        if self._blocks is None or not self._blocks_due:
            return None
        message = self._blocks.next()
        self._blocks_due = self._blocks.behind
        return message

    def _go_on_with_blocks(self) -> None:
        if self._blocks is not None and self._blocks.behind:
            self._blocks_due = True
            self.on_news()

    def close(self) -> None:
        if self._blocks is not None:
            self._blocks.close()

    def take(self) -> engine_pb2.SessionResponse | None:
        """All updates since the last call as one message, if there are any; one without sequences tells the load alone.

        The message belongs to the outbox and changes with the next call: whoever keeps it keeps a copy.
        """
        load_due, self._load_due = self._load_due, False
        pending = self._pending
        if not pending:
            return self._filled_in(engine_pb2.SessionResponse()) if load_due else None
        self._pending, self._pending_bytes = [], 0
        # One token each, for whom the last message brought one token each: what decodes do, step after step.
        steady = [(key, attempt, cached) for key, attempt, ids, logprobs, end, _, cached in pending
                  if end is None and not logprobs and len(ids) == 1]  # fmt: skip
        message = self._message
        if message is not None and steady == self._steady and len(steady) == len(pending):
            for told, progress in zip(self._told, pending, strict=True):
                told[0] = progress.token_ids[0]
        else:
            message = engine_pb2.SessionResponse()
            _fill(message.step, pending)
            alike = len(steady) == len(pending) == len(message.step.sequences)
            self._message = message if alike else None
            self._steady, self._told = steady, [update.token_ids for update in message.step.sequences]
        return self._filled_in(message)

    def _filled_in(self, message: engine_pb2.SessionResponse) -> engine_pb2.SessionResponse:
        message.step.step = self._step
        message.step.load.CopyFrom(load_to_message(self._load))
        return message


def _waits(load: LoadSnapshot) -> tuple[int, int]:
    """What of a load matters to newcomers; the rest changes with every step."""
    return load.running_sequences + load.waiting_sequences, load.queued_prompt_tokens


def _fill(message: engine_pb2.StepUpdate, pending: Sequence[SequenceProgress]) -> None:
    """With updates merged by sequence."""
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
    """All open sessions. ``deliver`` is called on the event loop, once per step.

    ``blocks``: the account of the prefix cache, None where there is no cache.
    """

    def __init__(self, blocks: BlockLog | None = None) -> None:
        self._outboxes: dict[int, Outbox] = {}
        self._next = 1
        self._blocks = blocks
        self._telling: asyncio.TimerHandle | None = None
        self._step, self._load = 0, LoadSnapshot()
        self._telling_loads: asyncio.TimerHandle | None = None

    def open(
        self, *, block_events: bool = False, pause_s: float = 0.0, load_pause_s: float | None = None
    ) -> tuple[int, Outbox]:
        """``block_events``: the router wants to know of blocks, by messages with ``pause_s`` between them.

        It is told from the first ``tell_blocks`` on. ``load_pause_s``: it wants to know of loads that others change.
        """
        reader = self._blocks.open() if self._blocks is not None and block_events else None
        session, outbox = self._next, Outbox(reader, pause_s, load_pause_s)
        self._next += 1
        self._outboxes[session] = outbox
        return session, outbox

    def close(self, session: int) -> None:
        outbox = self._outboxes.pop(session, None)
        if outbox is not None:
            outbox.close()

    def deliver(self, published: Published) -> None:
        by_session: dict[int, list[SequenceProgress]] = {}
        for progress in published.progresses:
            by_session.setdefault(progress.key.session, []).append(progress)
        for session, mine in by_session.items():
            outbox = self._outboxes.get(session)
            if outbox is not None:  # a closed session's last updates interest nobody
                outbox.put(published.step, mine, published.load)
        if _waits(published.load) != _waits(self._load):
            self.load_changed(published.step, published.load, but=by_session)
        if published.blocks and self._blocks is not None:
            self._blocks.append(published.blocks)
            if self._blocks.has_readers and self._telling is None:
                self._telling = asyncio.get_running_loop().call_later(TELL_BLOCKS_S, self._tell_blocks)

    def load_changed(self, step: int, load: LoadSnapshot, but: Container[int]) -> None:
        """A sequence came, went or was computed: all sessions but some, who know, hear of it."""
        self._step, self._load = step, load
        if len(self._outboxes) == 1:
            return  # nobody else to change it, so that its own messages say enough
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        late = [o for s, o in self._outboxes.items() if s not in but and not o.load_changed(step, load, now_s)]
        if late and self._telling_loads is None:
            self._telling_loads = loop.call_later(TELL_LOADS_S, self._tell_loads)

    def _tell_loads(self) -> None:
        self._telling_loads = None
        self.load_changed(self._step, self._load, {s for s, o in self._outboxes.items() if not o.load_is_late})

    def _tell_blocks(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        early = [outbox for outbox in self._outboxes.values() if not outbox.tell_blocks(now_s)]
        self._telling = loop.call_later(TELL_BLOCKS_S, self._tell_blocks) if early else None
