"""A simulated replica: a queue, one prompt computed at a time, decodes beside it, an LRU cache of KV blocks.

Deliberately simple, with what routing can feel: prompts wait for each other, cached blocks are not computed again,
running sequences slow each other down and keep their blocks, and what is not in use is evicted oldest first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.domain.endpoint import Endpoint, LoadSnapshot
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.v1 import engine_pb2
from ops.bench.routing.traces import BLOCK_SIZE, Turn


@dataclass(frozen=True)
class Hardware:
    """Rates of one replica; about a 70B model on four accelerators of 80 GB."""

    prefill_tokens_per_s: float = 8000.0
    step_s: float = 0.02  # of a decode
    step_s_per_sequence: float = 0.0004
    max_num_seqs: int = 48
    kv_blocks: int = 6000


@dataclass(eq=False)
class Job:
    """One request at a replica."""

    turn: Turn
    arrived_s: float
    cached_tokens: int = 0
    first_token_s: float = 0.0
    named: list[int] = field(default_factory=list)  # blocks in use by name, in order
    unnamed: int = 0  # blocks in use that nobody else can find


class SimulatedReplica:
    """``submit``, then ``begin`` whenever something changed; the caller says when jobs are ``computed``, ``ended``."""

    def __init__(self, slot: int, hardware: Hardware, model: str = "demo") -> None:
        self.endpoint = Endpoint(
            Incarnation(ReplicaId(model, slot), 1), f"127.0.0.1:{slot + 1}", "sha256:a", BLOCK_SIZE
        )
        self.hardware = hardware
        self.waiting: deque[Job] = deque()
        self.running: set[Job] = set()
        self.computing: Job | None = None
        self.computed_tokens = 0
        self._done_s = 0.0
        self._in_use: dict[int, int] = {}  # name -> sequences that use it
        self._idle: OrderedDict[int, None] = OrderedDict()  # name -> nothing, the first to be evicted first
        self._unnamed = 0
        self._stored: list[int] = []
        self._removed: list[int] = []
        self._sequence_number = 0

    # ---- requests

    def submit(self, job: Job) -> None:
        self.waiting.append(job)

    def begin(self, now_s: float) -> tuple[Job, float] | None:
        """The next job whose prompt is computed from now on, and until when; None when none can begin."""
        if self.computing is not None or not self.waiting or len(self.running) >= self.hardware.max_num_seqs:
            return None
        job = self.waiting[0]
        names = list(job.turn.blocks.leading(BLOCK_SIZE))
        hits = self.leading_hits(names)
        new_blocks = (len(job.turn.prompt) + job.turn.answer_tokens + BLOCK_SIZE) // BLOCK_SIZE - hits
        held_idle = sum(name in self._idle for name in names[:hits])
        free = self.hardware.kv_blocks - self._used - held_idle
        if new_blocks > free and self.running:
            return None
        self.waiting.popleft()
        for name in names[:hits]:
            self._use(name)
        self._evict(new_blocks)
        job.named, job.unnamed = names[:hits], new_blocks
        self._unnamed += new_blocks
        job.cached_tokens = job.turn.blocks.leading(BLOCK_SIZE).cached_tokens(hits)
        self.computing = job
        self.running.add(job)
        todo = len(job.turn.prompt) - job.cached_tokens
        self.computed_tokens += todo
        self._done_s = now_s + todo / self.hardware.prefill_tokens_per_s + self.step_s
        return job, self._done_s

    def computed(self, job: Job, now_s: float) -> float:
        """The prompt is computed and the first token is there; returns when the last one will be."""
        assert self.computing is job
        self.computing = None
        job.first_token_s = now_s
        self._name(job, list(job.turn.blocks.leading(BLOCK_SIZE)))
        return now_s + job.turn.answer_tokens * self.step_s

    def ended(self, job: Job) -> None:
        self._name(job, list(job.turn.after))
        self.running.remove(job)
        self._unnamed -= job.unnamed
        for name in reversed(job.named):  # what follows is evicted before what it follows
            self._in_use[name] -= 1
            if not self._in_use[name]:
                del self._in_use[name]
                self._idle[name] = None

    # ---- what others may know

    def leading_hits(self, names: Sequence[int]) -> int:
        """How many of the leading blocks are cached."""
        for count, name in enumerate(names):
            if name not in self._in_use and name not in self._idle:
                return count
        return len(names)

    def leading_hits_soon(self, names: Sequence[int]) -> int:
        """The same with the prompts that are here already and not computed yet."""
        coming = [*self.waiting] + ([self.computing] if self.computing else [])
        shared = [_common(names, job.turn.blocks.leading(BLOCK_SIZE)) for job in coming]
        return max(self.leading_hits(names), *shared) if shared else self.leading_hits(names)

    def load(self, now_s: float) -> LoadSnapshot:
        left = (self._done_s - now_s) * self.hardware.prefill_tokens_per_s if self.computing else 0.0
        return LoadSnapshot(
            running_sequences=len(self.running),
            waiting_sequences=len(self.waiting),
            queued_prompt_tokens=sum(len(job.turn.prompt) for job in self.waiting) + max(0, round(left)),
            kv_blocks_used=self._used,
            kv_blocks_total=self.hardware.kv_blocks,
        )

    @property
    def has_news(self) -> bool:
        return bool(self._stored or self._removed)

    def news(self) -> engine_pb2.BlockEvents:
        """The blocks that came and went since the last call."""
        self._sequence_number += 1
        stored, removed = dict.fromkeys(self._stored), dict.fromkeys(self._removed)
        message = engine_pb2.BlockEvents(
            sequence_number=self._sequence_number,
            reset=self._sequence_number == 1,
            complete=self._sequence_number == 1,
            stored=[name for name in stored if name in self._in_use or name in self._idle],
            removed=[name for name in removed if name not in self._in_use and name not in self._idle],
        )
        self._stored, self._removed = [], []
        return message

    # ---- blocks

    @property
    def _used(self) -> int:
        return len(self._in_use) + self._unnamed

    @property
    def step_s(self) -> float:
        return self.hardware.step_s + self.hardware.step_s_per_sequence * len(self.running)

    def _use(self, name: int) -> None:
        self._idle.pop(name, None)
        self._in_use[name] = self._in_use.get(name, 0) + 1

    def _name(self, job: Job, names: Sequence[int]) -> None:
        """The blocks of ``job`` that are full by now can be found from now on."""
        for name in names[len(job.named) :]:
            if name not in self._in_use and name not in self._idle:
                self._stored.append(name)
            self._use(name)
            job.named.append(name)
            job.unnamed -= 1
            self._unnamed -= 1

    def _evict(self, wanted: int) -> None:
        while self._idle and self._used + len(self._idle) + wanted > self.hardware.kv_blocks:
            name, _ = self._idle.popitem(last=False)
            self._removed.append(name)


def _common(names: Sequence[int], others: Sequence[int]) -> int:
    """How many leading names are the same: names are chained, so that halving finds the place."""
    low, high = 0, min(len(names), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if names[middle - 1] == others[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
