"""The sessions of the current endpoint table: one owner for who is there and who is up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from cluster.domain.endpoint import EndpointTable
from cluster.domain.errors import ModelNotFound, RejectReason, RequestRejected
from cluster.domain.ids import Incarnation
from cluster.router.endpoint_table import supersedes, table_change
from cluster.router.policy.contracts import Choice, Demand, Profile
from cluster.router.policy.profiles import LEAST_LOAD, choose
from cluster.router.sequence_stream import LossReason
from cluster.router.session import EngineSession, ServedModel, SessionSettings
from cluster.telemetry.logs import Logger


class Fleet:
    """Opens and closes sessions as tables come; ``on_change`` hears of every change of readiness."""

    def __init__(
        self, settings: SessionSettings, log: Logger, on_change: Callable[[], None], rng: random.Random | None = None
    ) -> None:
        self._settings = settings
        self._log = log
        self._on_change = on_change
        self._rng = rng or random.Random(0)  # noqa: S311 - breaks ties, keeps no secrets
        self._profile: Profile = LEAST_LOAD
        self._table: EndpointTable | None = None
        self._sessions: dict[Incarnation, EngineSession] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._waiters: set[asyncio.Future[None]] = set()

    def apply(self, table: EndpointTable) -> bool:
        """Makes ``table`` the current one; False when it is older than that."""
        if not supersedes(table, self._table):
            return False
        change = table_change(tuple(s.endpoint for s in self._sessions.values()), table)
        self._table = table
        for endpoint in change.closed:
            self._close(self._sessions.pop(endpoint.incarnation))
        for endpoint in change.updated:
            self._sessions[endpoint.incarnation].endpoint = endpoint
        for endpoint in change.opened:
            self._sessions[endpoint.incarnation] = EngineSession(endpoint, self._settings, self._changed, self._log)
        self._changed()
        return True

    @property
    def epoch(self) -> int:
        return self._table.epoch if self._table else 0

    @property
    def ready(self) -> bool:
        """Whether some endpoint takes new work."""
        return any(session.up and not session.endpoint.draining for session in self._sessions.values())

    @property
    def replicas(self) -> frozenset[str]:
        """The replicas of the endpoint table, by name."""
        return frozenset(str(incarnation.replica) for incarnation in self._sessions)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is served or wanted, sorted."""
        wanted = self._table.models if self._table else ()
        return tuple(sorted({*wanted, *(s.endpoint.model for s in self._sessions.values())}))

    def resolve(self, model: str) -> str | None:
        """The name of the model that a request for ``model`` means, "" being the only one; None when there is none."""
        known = self.models
        if not model and len(known) == 1:
            return known[0]
        return model if model in known else None

    def ready_replicas(self, model: str) -> int:
        return sum(s.up and not s.endpoint.draining and s.endpoint.model == model for s in self._sessions.values())

    def served(self, model: str) -> ServedModel:
        """What ``model`` is, "" being the only one. ModelNotFound, or RequestRejected NO_ENDPOINT."""
        known, named = self.models, self.resolve(model)
        if not known:
            raise RequestRejected(RejectReason.NO_ENDPOINT, "No model is served yet; try again in a moment.")
        if named is None:
            names = ", ".join(known)
            what = (
                f"No model is called {model!r}" if model else "Several models are served, so the request must name one"
            )
            raise ModelNotFound(f"{what}; served are: {names}.")
        for session in self._sessions.values():
            if session.endpoint.model == named and session.up and session.served is not None:
                return session.served
        raise RequestRejected(RejectReason.NO_ENDPOINT, f"No replica of model {named} is ready; try again in a moment.")

    def choose(self, demand: Demand) -> tuple[EngineSession, Choice] | None:
        """The session that ``demand`` goes to; None when no endpoint qualifies now."""
        choice = choose(self._profile, [s.candidate for s in self._sessions.values()], demand, self._rng)
        if choice is None:
            return None
        return self._sessions[choice.candidate.endpoint.incarnation], choice

    def change(self) -> asyncio.Future[None]:
        """A future that the next change of any endpoint completes; cancel it when it is no longer wanted."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)
        return waiter

    @property
    def open_sequences(self) -> int:
        return sum(session.open_sequences for session in self._sessions.values())

    @property
    def outstanding_tokens(self) -> int:
        return sum(session.load.outstanding_tokens for session in self._sessions.values())

    async def close(self) -> None:
        for session in self._sessions.values():
            self._close(session)
        self._sessions = {}
        if self._closing:
            await asyncio.wait(self._closing)

    def _close(self, session: EngineSession) -> None:
        task = asyncio.get_running_loop().create_task(session.close(LossReason.REMOVED))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _changed(self) -> None:
        for waiter in tuple(self._waiters):
            if not waiter.done():
                waiter.set_result(None)
        self._on_change()
