"""Which KV blocks can be found by name here, told to every router that asks, each at its own pace.

The compute thread notes what a step changed (``RecentBlocks``); the leader's event loop keeps an account of all names
and a bounded log of what changed (``BlockLog``), and each session reads from it (``BlockReader``). Nobody waits for a
reader: one that falls behind the log's end gets the whole account again, in small messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from cluster.domain.block_hash import short_name
from cluster.v1 import engine_pb2

MAX_NAMES = 512  # of one message: 4 KiB, so that tokens behind it hardly wait
MAX_LOGGED = 65_536  # names of changes that are kept for readers; whoever is behind those gets a full account

# The names that changed, and whether each can be found now.
BlockChanges = Mapping[bytes, bool]


class RecentBlocks:
    """A ``BlockRecorder`` for the compute thread: what has changed since the last ``take``."""

    def __init__(self) -> None:
        self._changes: dict[bytes, bool] = {}

    def stored(self, name: bytes, block: int) -> None:
        del block
        self._changes[name] = True

    def removed(self, name: bytes, block: int) -> None:
        del block
        self._changes[name] = False

    def take(self) -> BlockChanges | None:
        """None: nothing has changed."""
        if not self._changes:
            return None
        changes, self._changes = self._changes, {}
        return changes


class BlockLog:
    """All names there are, in the order in which they came, and the last changes. Lives on one thread.

    Changes are kept while there are readers only. They have positions: 0, 1, 2 ... for pieces of at most MAX_NAMES.
    """

    def __init__(self, max_logged: int = MAX_LOGGED) -> None:
        self._max_logged = max_logged
        self._held: dict[int, None] = {}
        self._pieces: deque[dict[int, bool]] = deque()
        self._num_logged = 0
        self._num_readers = 0
        self._first = 0  # the position of the first piece

    def append(self, changes: BlockChanges) -> None:
        held = self._held
        piece: dict[int, bool] = {}
        for name, found in changes.items():
            short = short_name(name)
            piece[short] = found
            if found:
                held[short] = None
            else:
                held.pop(short, None)
            if len(piece) == MAX_NAMES:
                self._log(piece)
                piece = {}
        if piece:
            self._log(piece)

    @property
    def has_readers(self) -> bool:
        return self._num_readers > 0

    @property
    def first(self) -> int:
        """The position of the oldest change that is still known."""
        return self._first

    @property
    def end(self) -> int:
        """The position that the next change will have."""
        return self._first + len(self._pieces)

    def names(self) -> list[int]:
        """Everything that can be found now; beginnings of prompts tend to come before what follows them."""
        return list(self._held)

    def piece(self, position: int) -> Mapping[int, bool]:
        """Changes from ``first`` up to, not including, ``end``."""
        return self._pieces[position - self._first]

    def open(self) -> BlockReader:
        """A reader that begins with a full account; ``close`` it."""
        self._num_readers += 1
        return BlockReader(self)

    def reader_closed(self) -> None:
        self._num_readers -= 1
        assert self._num_readers >= 0, "a reader was closed twice"
        if not self._num_readers:
            self._first = self.end
            self._pieces.clear()
            self._num_logged = 0

    def _log(self, piece: dict[int, bool]) -> None:
        if not self._num_readers:
            return
        self._pieces.append(piece)
        self._num_logged += len(piece)
        while self._num_logged > self._max_logged:
            self._num_logged -= len(self._pieces.popleft())
            self._first += 1


class BlockReader:
    """What one session is told: a full account, then changes. Each message holds MAX_NAMES names at most."""

    def __init__(self, log: BlockLog) -> None:
        self._log = log
        self._position = -1  # of the next change to tell; before the log's first: a full account is due
        self._account: list[int] | None = None  # the one that is being told, and how much of it was
        self._told = 0
        self._messages = 0

    @property
    def behind(self) -> bool:
        """Whether there is something to tell."""
        return self._account is not None or self._position < self._log.end

    def restart(self) -> None:
        """The session has missed something: it gets a full account."""
        self._position, self._account = -1, None

    def next(self) -> engine_pb2.BlockEvents | None:
        """The next message; None when there is nothing to tell."""
        if not self.behind:
            return None
        self._messages += 1
        message = engine_pb2.BlockEvents(sequence_number=self._messages)
        if self._position < self._log.first:
            self._account, self._told, self._position = self._log.names(), 0, self._log.end
            message.reset = True
        if self._account is not None:
            message.stored.extend(self._account[self._told : self._told + MAX_NAMES])
            self._told += MAX_NAMES
            if self._told >= len(self._account):
                self._account = None
                message.complete = True
            return message
        changes = self._changes()
        message.stored.extend([name for name, found in changes.items() if found])
        message.removed.extend([name for name, found in changes.items() if not found])
        return message

    def close(self) -> None:
        self._log.reader_closed()

    def _changes(self) -> Mapping[int, bool]:
        """As many pieces as fit in a message; of a name that changed more than once, how it is now."""
        changes = dict(self._log.piece(self._position))
        self._position += 1
        while self._position < self._log.end:
            piece = self._log.piece(self._position)
            if len(changes) + len(piece) > MAX_NAMES:
                break
            changes.update(piece)
            self._position += 1
        return changes
