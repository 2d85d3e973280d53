"""Step plans from the leader to the other ranks, and sampled tokens back: framed messages on stream sockets.

A rank that waits for its next plan sleeps in ``recv``: an idle replica costs no CPU. Closing the leader's end is how
the others learn that it is gone. Plans carry changes only (ADR 0011): every rank keeps the block tables, the rank
that samples keeps the histories.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

from cluster.domain.clock import Clock
from cluster.domain.errors import EngineFailed
from cluster.domain.ids import Incarnation
from cluster.domain.request import TokenLogprob
from cluster.engine.rank_socket import (
    STEP_WAIT_S,
    FrameSender,
    Hello,
    accept_ranks,
    hang_up,
    join_rank,
    receive_exactly,
)
from cluster.engine.step import SequenceKey, SequenceStart, StepEntry, StepPlan
from cluster.v1 import engine_pb2
from cluster.wire.convert import logprob_from_message, logprob_to_message, sampling_from_message, sampling_to_message

CHANNEL = b"plan"
MAX_FRAME_BYTES = 64 * 2**20
_LENGTH = struct.Struct("!I")
_LOADED = b"L"
_LEADER = "The leader"
_NOBODY = SequenceKey(0, 0)  # only the leader knows whose an entry is
_NO_BLOCKS: tuple[int, ...] = ()

# What a rank sampled for one sequence; its key is the leader's to know.
Token = tuple[int, TokenLogprob | None]


def encode_plan(plan: StepPlan, *, with_starts: bool = False) -> bytes:
    """``plan`` without its sequences' names, which only the leader needs."""
    entries = plan.entries
    token_ids = [token for entry in entries for token in entry.token_ids]
    message = engine_pb2.StepPlan(
        step=plan.step,
        slots=[entry.slot for entry in entries],
        token_ids=token_ids,
        token_starts=[entry.start for entry in entries],
        first_blocks=[entry.first_block for entry in entries],
        unsampled=[i for i, entry in enumerate(entries) if not entry.sample],
        prompt_counts=[entry.num_prompt for entry in entries],
    )
    if len(token_ids) > len(entries):
        message.token_counts.extend([len(entry.token_ids) for entry in entries])
    new_block_ids = [block for entry in entries for block in entry.new_block_ids]
    if new_block_ids:
        message.new_block_ids.extend(new_block_ids)
        message.new_block_counts.extend([len(entry.new_block_ids) for entry in entries])
    if with_starts and plan.starts:
        message.sequence_starts.extend([_start_to_message(start) for start in plan.starts])
    return _frame(message.SerializeToString())


def decode_plan(message: engine_pb2.StepPlan) -> StepPlan:
    """The plan as a rank other than the leader sees it; its keys say nothing."""
    slots, positions = list(message.slots), list(message.token_starts)
    sampled = [True] * len(slots)
    for index in message.unsampled:
        sampled[index] = False
    tokens = _split(tuple(message.token_ids), message.token_counts, len(slots))
    blocks = [_NO_BLOCKS] * len(slots)
    if message.new_block_counts:
        blocks = _split(tuple(message.new_block_ids), message.new_block_counts, len(slots))
    columns = zip(slots, tokens, positions, message.first_blocks, blocks, sampled, message.prompt_counts, strict=True)
    entries = tuple([StepEntry(_NOBODY, *column) for column in columns])
    return StepPlan(message.step, entries, tuple(_start_from_message(start) for start in message.sequence_starts))


def ready_signal() -> bytes:
    """Tells the ranks that the warm-up is over."""
    return _frame(engine_pb2.StepPlan(ready=True).SerializeToString())


def encode_tokens(step: int, tokens: Sequence[Token]) -> bytes:
    rows = [row for row, (_, logprob) in enumerate(tokens) if logprob is not None]
    message = engine_pb2.SampledTokens(step=step, token_ids=[token_id for token_id, _ in tokens], logprob_rows=rows)
    message.logprobs.extend([logprob_to_message(logprob) for _, logprob in tokens if logprob is not None])
    return _frame(message.SerializeToString())


class PlanSender:
    """The leader's end: one connection to every other rank. Not thread-safe; the compute thread owns it.

    Sending waits for nobody: a rank may be waiting for the leader's hidden states with its plans unread. The plans
    outstanding bound what is underway. ``sampling_rank`` alone hears of sequences that start; 0 (the leader itself):
    nobody does. ``failed`` is told, from another thread, when a rank takes no more.
    """

    def __init__(
        self, host: str, port: int, incarnation: Incarnation, sampling_rank: int, failed: Callable[[str], None]
    ) -> None:
        self._listener = socket.create_server((host, port))
        self._incarnation, self._sampling_rank, self._failed = incarnation, sampling_rank, failed
        self._peers: dict[int, FrameSender] = {}

    @property
    def sockets(self) -> Mapping[str, socket.socket]:
        return {f"Rank {rank}": peer.socket for rank, peer in self._peers.items()}

    def accept(self, ranks: int, deadline_s: float, clock: Clock) -> None:
        """Waits for ranks 1 .. ``ranks`` - 1; EngineFailed names those that did not come in time."""
        expected = [Hello(CHANNEL, self._incarnation, rank) for rank in range(1, ranks)]
        joined = accept_ranks(self._listener, expected, deadline_s, clock)
        self._peers = {rank: FrameSender(peer, f"Rank {rank}", self._failed) for rank, peer in joined.items()}

    def await_loaded(self, deadline_s: float) -> None:
        """Waits until every rank has said that its weights are there; EngineFailed when one does not."""
        for rank, peer in self._peers.items():
            peer.socket.settimeout(deadline_s)
            receive_exactly(peer.socket, len(_LOADED), f"Rank {rank}")
            peer.socket.settimeout(STEP_WAIT_S)

    def send(self, plan: StepPlan) -> None:
        """To every rank; EngineFailed when one is gone."""
        frame = encode_plan(plan)
        for_sampling = encode_plan(plan, with_starts=True) if plan.starts and self._sampling_rank else frame
        for rank, peer in self._peers.items():
            peer.send(b"", memoryview(for_sampling if rank == self._sampling_rank else frame))

    def send_ready(self) -> None:
        """The warm-up is over."""
        frame = ready_signal()
        for peer in self._peers.values():
            peer.send(b"", memoryview(frame))

    def receive_tokens(self, step: int) -> list[Token]:
        """What the sampling rank made of ``step``, in plan order; EngineFailed when it does not say."""
        who = f"Rank {self._sampling_rank}"
        peer = self._peers[self._sampling_rank].socket
        frame = _receive_rest(peer, receive_exactly(peer, _LENGTH.size, who), who)
        message = engine_pb2.SampledTokens.FromString(frame)
        if message.step != step:
            raise EngineFailed(f"{who} answered step {message.step} instead of {step}.", retryable=True)
        tokens: list[Token] = [(token_id, None) for token_id in message.token_ids]
        for row, logprob in zip(message.logprob_rows, message.logprobs, strict=True):
            tokens[row] = (message.token_ids[row], logprob_from_message(logprob))
        return tokens

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._listener.close()


class PlanReceiver:
    """Another rank's end."""

    def __init__(self, host: str, port: int, incarnation: Incarnation, rank: int) -> None:
        self._address, self._hello = (host, port), Hello(CHANNEL, incarnation, rank)
        self._socket: socket.socket | None = None

    @property
    def sockets(self) -> Mapping[str, socket.socket]:
        return {_LEADER: self._open()}

    def connect(self, deadline_s: float, clock: Clock) -> None:
        """Tries until the leader listens, at most ``deadline_s``."""
        self._socket = join_rank(self._address, self._hello, deadline_s, clock)

    def tell_loaded(self) -> None:
        """From now on plans can be run here."""
        _send(self._open(), _LOADED)

    def receive(self) -> engine_pb2.StepPlan:
        """The next plan; EngineFailed when the leader is gone. An idle engine sends nothing for as long as it likes."""
        leader = self._open()
        leader.settimeout(None)
        first = receive_exactly(leader, _LENGTH.size, _LEADER)
        leader.settimeout(STEP_WAIT_S)
        return engine_pb2.StepPlan.FromString(_receive_rest(leader, first, _LEADER))

    def answer(self, step: int, tokens: Sequence[Token]) -> None:
        """To the leader, by the rank that samples."""
        _send(self._open(), encode_tokens(step, tokens))

    def _open(self) -> socket.socket:
        assert self._socket is not None, "connect first"
        return self._socket

    def close(self) -> None:
        if self._socket is not None:
            hang_up(self._socket)


def _start_to_message(start: SequenceStart) -> engine_pb2.SequenceStart:
    return engine_pb2.SequenceStart(
        slot=start.slot,
        sampling=sampling_to_message(start.params),
        logprobs=start.params.logprobs,
        prompt_token_ids=start.prompt_token_ids,
        generated_token_ids=start.generated_token_ids,
    )


def _start_from_message(message: engine_pb2.SequenceStart) -> SequenceStart:
    return SequenceStart(
        message.slot,
        sampling_from_message(message.sampling, message.logprobs),
        tuple(message.prompt_token_ids),
        tuple(message.generated_token_ids),
    )


def _split(values: tuple[int, ...], counts: Sequence[int], entries: int) -> list[tuple[int, ...]]:
    """``values`` in runs of ``counts``; without counts in runs of one."""
    if not counts:
        assert len(values) == entries, (len(values), entries)
        return list(zip(values, strict=True))
    ends = accumulate(counts, initial=0)
    return [values[start:end] for start, end in pairwise(ends)]


def _frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


def _send(leader: socket.socket, frame: bytes) -> None:
    try:
        leader.sendall(frame)
    except OSError as error:
        raise EngineFailed(f"{_LEADER} takes nothing: {error}", retryable=True) from error


def _receive_rest(peer: socket.socket, length: bytearray, who: str) -> bytes:
    (count,) = _LENGTH.unpack(length)
    if count > MAX_FRAME_BYTES:
        raise EngineFailed(f"{who} sends a message of {count} bytes, which is none of ours.", retryable=False)
    return bytes(receive_exactly(peer, count, who))
