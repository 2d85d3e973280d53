"""Adapter: requests that wait for an endpoint, woken when one has room.

Decisions are ``admission``'s. Whoever waits awaits one future, without a task of its own. The desk looks when an
endpoint with room reports, ends a sequence or comes up, and, while somebody waits, every LOOK_AGAIN_S; it costs one
test per step message while nobody does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import nsmallest

from cluster.config.schema import RouterConfig
from cluster.domain.clock import Clock
from cluster.domain.errors import ClusterError, EngineFailed, RejectReason, RequestEvicted, RequestRejected
from cluster.router.admission import Admission, AdmissionLimits, Refusal, SentAway
from cluster.router.fleet import Fleet
from cluster.router.interruption import Interruption
from cluster.router.policy.contracts import Choice, Demand
from cluster.router.session import EngineSession
from cluster.router.waiting_rank import Entry
from cluster.telemetry.metrics import RouterMetrics

LOOK_AGAIN_S = 0.25
LINES_KEPT = 2  # for each model, whether anybody serves their checkpoint or has a request in them, or not
ANY_CHECKPOINT = ""
CONTINUATIONS_TRIED = 16  # that find no endpoint at one look, before new requests get theirs
Placed = tuple[EngineSession, Choice]


@dataclass(slots=True, eq=False)
class Ticket:
    """One request at the desk, for all its attempts.

    ``checkpoint_digest``: what it was tokenized for; who waits for another one is in another line. ``demand``: what it
    asks of an endpoint now, with room or without; ``tokens``: those that it brings along. ``movable``: it may be
    tokenized anew for another checkpoint, where that has room.
    """

    model: str
    checkpoint_digest: str
    entry: Entry
    demand: Callable[[bool], Demand]
    tokens: int
    movable: bool = False
    line: _Line | None = None


class _Line:
    """What waits for one model and checkpoint: what frees a place for one of them frees one for each of them."""

    __slots__ = ("admission", "armed", "checkpoint_digest", "looking", "model", "passed_over", "waiting")

    def __init__(self, model: str, checkpoint_digest: str, limits: AdmissionLimits) -> None:
        self.model, self.checkpoint_digest = model, checkpoint_digest
        self.admission = Admission(limits)
        self.waiting: dict[Entry, tuple[Ticket, asyncio.Future[Placed]]] = {}
        self.looking = False  # a look is on its way
        self.armed = False  # the next look comes by itself
        self.passed_over = 0  # continuations that found no endpoint at the last look, which others follow


class AdmissionDesk:
    """Gives each request its endpoint in turn. One per router; ``fleet`` tells it when there may be room."""

    def __init__(self, fleet: Fleet, config: RouterConfig, metrics: RouterMetrics, clock: Clock) -> None:
        self._fleet, self._config, self._metrics, self._clock = fleet, config, metrics, clock
        self._limits = AdmissionLimits(
            max_requests=config.max_queued_requests,
            max_prompt_tokens=config.max_queued_prompt_tokens,
            ttft_objective_s=config.ttft_objective_s,
            max_wait_s=config.max_queue_wait_s,
        )
        self._lines: dict[tuple[str, str], _Line] = {}  # by model and checkpoint
        self._waiting_lines: set[_Line] = set()
        fleet.watch_room(self._room_at, self._fleet_changed)

    async def place(self, ticket: Ticket, interruption: Interruption) -> Placed | None:
        """The endpoint that the request has to be sent to before anything else is awaited; or the choice is not used.

        None when no endpoint of its checkpoint takes new requests, or those of another one have room that nobody there
        waits for and the request is ``movable``. RequestRejected or RequestEvicted when it may not wait,
        EngineFailed when it had an endpoint and waited in vain, or what ``interruption`` is tripped with.
        """
        line = ticket.line
        if line is None:
            line = ticket.line = self._line(ticket.model, ticket.checkpoint_digest)
        entry, queue = ticket.entry, line.admission.queue
        if not (queue.continuations if entry.exempt else queue.requests):
            found = self._fleet.choose(ticket.demand(True))
            if found is not None and queue.continuations and not entry.exempt:  # those go first
                found[1].not_used()
                self._place_continuations(line, self._clock.now())
                found = self._fleet.choose(ticket.demand(True))
            if found is not None:
                line.admission.pass_through(entry)
                return found
        if not entry.exempt and not self._fleet.serves(ticket.demand(False)):
            return None
        return await self._wait(line, ticket, interruption)

    def first_token_after(self, ticket: Ticket, seconds: float) -> None:
        assert ticket.line is not None, "nothing was placed"
        ticket.line.admission.first_token_after(ticket.entry, seconds)

    def close(self, ticket: Ticket, prompt_tokens: int, generated: int, *, complete: bool) -> None:
        """The request is over. ``prompt_tokens`` were computed for it, not found in a cache."""
        if ticket.line is not None and ticket.entry.charged:
            ticket.line.admission.ended(ticket.entry, prompt_tokens, generated, complete=complete)

    async def _wait(self, line: _Line, ticket: Ticket, interruption: Interruption) -> Placed | None:
        entry, admission = ticket.entry, line.admission
        answer: asyncio.Future[Placed] = asyncio.get_running_loop().create_future()
        for away in admission.offer(entry, self._clock.now()):
            if away.entry is entry:
                raise self._error(away)
            self._send_away(line, away)
        line.waiting[entry] = ticket, answer
        self._waiting_lines.add(line)
        self._show(line)
        self._arm(line)
        placed: Placed | None = None
        try:
            with interruption.calls(partial(_fail, answer)):
                placed = await answer
        except _NoEndpointLeft:
            return None
        finally:
            if line.waiting.pop(entry, None) is not None and entry.queued:
                admission.withdraw(entry, self._clock.now())
            self._settle(line, ticket, answer, used=placed is not None)
            del answer  # its error knows this frame
        return placed

    def _settle(self, line: _Line, ticket: Ticket, answer: asyncio.Future[Placed], *, used: bool) -> None:
        """Gives the place back that was kept meanwhile, whoever uses it."""
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            session, choice = answer.result()
            session.load.let_go(ticket.tokens)
            if not used:
                choice.not_used()
            self._room_at(session)  # in case it is not used
        self._show(line)

    def _line(self, model: str, checkpoint_digest: str) -> _Line:
        key = model, checkpoint_digest
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(model, checkpoint_digest, self._limits)
        return line

    # ---- looking for places

    def _room_at(self, session: EngineSession) -> None:
        """Something has changed at ``session``."""
        if not self._waiting_lines or not session.load.has_room:
            return
        endpoint = session.endpoint
        for digest in {endpoint.checkpoint_digest, ANY_CHECKPOINT}:
            line = self._lines.get((endpoint.model, digest))
            if line in self._waiting_lines:
                self._look_soon(line)
                return
        for line in self._waiting_lines:  # nobody waits for this one: those who wait for another may move
            if line.model == endpoint.model:
                self._look_soon(line)

    def _fleet_changed(self) -> None:
        for line in tuple(self._waiting_lines):
            self._look_soon(line)
        if len(self._lines) > LINES_KEPT * len(self._fleet.models):
            self._lines = {key: line for key, line in self._lines.items() if line.admission.live or self._serves(line)}

    def _serves(self, line: _Line) -> bool:
        return self._fleet.serves(Demand(line.model, line.checkpoint_digest))

    def _look_soon(self, line: _Line) -> None:
        """Once per turn of the event loop, however much has happened in it."""
        if not line.looking:
            line.looking = True
            asyncio.get_running_loop().call_soon(self._look, line)

    def _look(self, line: _Line) -> None:
        """Gives places to those whose turn it is, for as long as there are any."""
        line.looking = False
        queue, now_s = line.admission.queue, self._clock.now()
        for away in line.admission.expire(now_s):
            self._send_away(line, away)
        self._place_continuations(line, now_s)
        while (head := queue.head()) is not None:
            if self._give_place(line, head, now_s):
                continue
            ticket, answer = line.waiting[head]
            if self._fleet.serves(ticket.demand(False)):
                self._move(line, now_s)
                break  # somebody will have room for it
            line.admission.withdraw(head, now_s)
            _fail(answer, _NoEndpointLeft())
        self._show(line)
        if queue:
            self._arm(line)
        else:
            self._waiting_lines.discard(line)

    def _move(self, line: _Line, now_s: float) -> None:
        """As many as there are places for at endpoints of other checkpoints, for which nobody waits, begin anew there.

        By level and arrival.
        """
        if any(one.model == line.model and one is not line and one.admission.queue for one in self._waiting_lines):
            return
        places = int(self._fleet.room_elsewhere(line.model, line.checkpoint_digest))
        if not places:
            return
        movable = (entry for entry, (ticket, _) in line.waiting.items() if ticket.movable and entry.queued)
        new = (entry for entry in movable if not entry.exempt)
        for entry in nsmallest(places, new, key=lambda one: (-one.level[0], -one.level[1], one.number)):
            line.admission.withdraw(entry, now_s)
            _fail(line.waiting[entry][1], _NoEndpointLeft())

    def _place_continuations(self, line: _Line, now_s: float) -> None:
        """Oldest first; those that find no endpoint do not keep others for ever from being tried."""
        exempt = line.admission.queue.exempt
        in_vain = 0
        for index in range(line.passed_over, len(exempt)):
            if in_vain == CONTINUATIONS_TRIED:
                line.passed_over = index
                return
            in_vain += not self._give_place(line, exempt[index], now_s)
        line.passed_over = 0

    def _give_place(self, line: _Line, entry: Entry, now_s: float) -> bool:
        ticket, answer = line.waiting[entry]
        if answer.done():  # interrupted or cancelled in this turn
            line.admission.withdraw(entry, now_s)
            return True
        found = self._fleet.choose(ticket.demand(True))
        if found is None:
            return False
        line.admission.take(entry, now_s)
        found[0].load.hold(ticket.tokens)
        answer.set_result(found)
        return True

    def _arm(self, line: _Line) -> None:
        """The next look, if nothing else brings one before."""
        if not line.armed:
            line.armed = True
            left_s = line.admission.next_due_s - self._clock.now()
            asyncio.get_running_loop().call_later(min(max(left_s, 0.0), LOOK_AGAIN_S), self._time_passed, line)

    def _time_passed(self, line: _Line) -> None:
        line.armed = False
        if line.admission.queue:
            self._look_soon(line)
        else:
            self._waiting_lines.discard(line)

    # ---- sending away

    def _send_away(self, line: _Line, away: SentAway) -> None:
        _, answer = line.waiting[away.entry]
        _fail(answer, self._error(away))

    def _error(self, away: SentAway) -> ClusterError:
        if away.entry.exempt:
            return EngineFailed(
                f"The replica broke and no other was ready within failover_wait_s "
                f"({self._config.failover_wait_s:g} s); send the request again with the tokens received so far.",
                retryable=True,
            )
        if away.refusal is Refusal.DEADLINE:
            return RequestEvicted(
                f"The request would wait about {away.wait_s:.1f} s for a replica, longer than its deadline allows; "
                "allow it more time."
            )
        again = f"try again in {away.retry_after_s:.1f} s"
        if away.refusal is Refusal.WAIT:
            message = (
                f"The wait for a replica is over max_queue_wait_s ({self._config.max_queue_wait_s:g} s); {again}, "
                "or send the request with a negative priority to wait for as long as it takes."
            )
        else:
            message = f"The queue is full, and it was not this request's turn to stay; {again}."
        return RequestRejected(RejectReason.QUEUE_FULL, message, away.retry_after_s)

    def _show(self, line: _Line) -> None:
        model = line.model
        queues = [one.admission.queue for one in self._lines.values() if one.model == model]
        self._metrics.queued_requests.labels(model=model).set(sum(map(len, queues)))
        self._metrics.queued_prompt_tokens.labels(model=model).set(sum(queue.prompt_tokens for queue in queues))


class _NoEndpointLeft(Exception):  # noqa: N818 - an event of the desk's inside
    """Nobody is left to wait for."""


def _fail(answer: asyncio.Future[Placed], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
