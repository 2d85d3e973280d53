"""Desired + observed + now -> actions. Pure: no clock, no Ray, no I/O.

One slot has one incarnation at a time: a new generation is started only when nothing is left of the last.
"""

from __future__ import annotations

from cluster.config.schema import ControllerConfig
from cluster.controller import health
from cluster.controller.actions import Action, Advance, Fence, Remove, Start
from cluster.controller.desired import Desired, DesiredModel, find_model
from cluster.controller.observed import Observed, ReplicaView, SlotHistory
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.domain.replica import ReplicaPhase

# An endpoint that drains needs this long until every router has seen it and nothing new arrives.
PROPAGATION_S = 1.0
# A replica that was ready for so long before it failed starts again without a longer pause than the first.
STABLE_AFTER_S = 5.0

_STARTING = (ReplicaPhase.PENDING, ReplicaPhase.STARTING, ReplicaPhase.LOADING)


def reconcile(desired: Desired, observed: Observed, settings: ControllerConfig, now_s: float) -> tuple[Action, ...]:
    """The next actions. Calling it again before they are carried out asks for the same ones."""
    actions: list[Action] = [Fence(s.incarnation, s.world_size) for s in observed.stale if now_s >= s.retry_at_s]
    for replica in observed.replicas:
        action = _one(replica, settings, now_s) or _leave(replica, observed, now_s)
        if action is not None:
            actions.append(action)
    moving = {action.incarnation for action in actions if isinstance(action, Advance)}
    names = dict.fromkeys([m.name for m in desired] + [r.replica.model for r in observed.replicas])
    for name in names:
        model = find_model(desired, name)
        replicas = tuple(r for r in observed.of_model(name) if r.incarnation not in moving and not r.half_known)
        actions.extend(_shrink(model, replicas, settings))
        if model is not None and now_s >= observed.adopt_until_s:
            actions.extend(_grow(model, observed, now_s))
    return tuple(actions)


def backoff_s(failures: int, settings: ControllerConfig) -> float:
    """Pause before the next start after so many failures in a row: doubling, bounded."""
    if failures == 0:
        return 0.0
    # 2**40 half seconds is far beyond every bound; the cap keeps the power small.
    return min(settings.restart_backoff_s * 2.0 ** min(failures - 1, 40), settings.restart_backoff_max_s)


def after_failure(
    history: SlotHistory,
    ready_for_s: float | None,
    settings: ControllerConfig,
    now_s: float,
    *,
    fingerprint: str,
    needs_change: bool = False,
    cause: str = "",
) -> SlotHistory:
    """The slot's memory once an incarnation failed that had been ready for ``ready_for_s`` (None: never).

    ``fingerprint``: what it was built of; failures of anything else do not count. ``needs_change``: over files or
    options that somebody has to mend first; the pause is the longest at once.
    """
    stable = ready_for_s is not None and ready_for_s >= STABLE_AFTER_S
    failures = 1 if stable or fingerprint != history.fingerprint else history.failures + 1
    pause_s = settings.restart_backoff_max_s if needs_change else backoff_s(failures, settings)
    return SlotHistory(history.generation, failures, now_s + pause_s, fingerprint, cause)


def _one(replica: ReplicaView, settings: ControllerConfig, now_s: float) -> Action | None:
    """What this incarnation's own state asks for, whatever is desired."""
    if replica.life.ended:
        waits = replica.teardown or now_s < replica.retry_at_s
        return None if waits else Remove(replica.incarnation)
    found = health.diagnose(replica, settings, now_s)
    if found is not None:
        return Advance(replica.incarnation, ReplicaEvent.FAIL, f"{found.kind}: {found.text}")
    if replica.phase is ReplicaPhase.DRAINING:
        return _drained(replica, now_s)
    if replica.phase in (ReplicaPhase.STARTING, ReplicaPhase.LOADING):
        if health.is_ready(replica):
            return Advance(replica.incarnation, ReplicaEvent.READY, "every rank is ready")
        if replica.phase is ReplicaPhase.STARTING and health.is_loading(replica):
            return Advance(replica.incarnation, ReplicaEvent.LOADING, "ranks read their shards")
    return None


def _leave(replica: ReplicaView, observed: Observed, now_s: float) -> Advance | None:
    """Ends what has a rank on a draining node, by that node's deadline."""
    nodes = () if replica.life.ended else observed.leaving(replica)
    if not nodes:
        return None
    reason, left_s = f"node {nodes[0].host} is draining", max(0.0, nodes[0].until_s - now_s)
    if replica.phase is ReplicaPhase.READY:
        return Advance(replica.incarnation, ReplicaEvent.DRAIN, reason, left_s)
    if left_s == 0 or (replica.phase in _STARTING and not replica.half_known):
        return Advance(replica.incarnation, ReplicaEvent.STOP, reason)
    return None


def _drained(replica: ReplicaView, now_s: float) -> Action | None:
    assert replica.drain_until_s is not None, replica
    if now_s >= replica.drain_until_s:
        return Advance(replica.incarnation, ReplicaEvent.STOP, "drain deadline reached")
    leader, quiet_from_s = replica.leader, replica.life.since_s + PROPAGATION_S
    if leader is not None and leader.reported_at_s >= quiet_from_s and leader.report.activity.idle:
        return Advance(replica.incarnation, ReplicaEvent.STOP, "drained: nothing is running")
    return None


def _shrink(model: DesiredModel | None, replicas: tuple[ReplicaView, ...], settings: ControllerConfig) -> list[Action]:
    """Ends what is too much or was built with other settings."""
    active = [r for r in replicas if not r.life.ended and r.phase is not ReplicaPhase.DRAINING]
    if model is None:
        return [_end(r, "the model is no longer wanted", settings) for r in active]
    excess = len(active) - model.replicas
    if excess > 0:
        # Those not ready go first, then the youngest.
        order = sorted(active, key=lambda r: (r.phase is ReplicaPhase.READY, -r.born_s, -r.replica.slot))
        return [_end(r, f"scaled to {model.replicas}", settings) for r in order[:excess]]
    outdated = [r for r in active if r.fingerprint != model.fingerprint]
    unready = [r for r in outdated if r.phase in _STARTING]
    if unready:
        return [_end(r, "its settings changed", settings) for r in unready]
    if outdated and len(active) == model.replicas and all(r.phase is ReplicaPhase.READY for r in replicas):
        return [_end(outdated[0], "its settings changed", settings)]
    return []


def _end(replica: ReplicaView, reason: str, settings: ControllerConfig) -> Advance:
    if replica.phase is ReplicaPhase.READY:
        return Advance(replica.incarnation, ReplicaEvent.DRAIN, reason, settings.drain_deadline_s)
    return Advance(replica.incarnation, ReplicaEvent.STOP, reason)


def _grow(model: DesiredModel, observed: Observed, now_s: float) -> list[Action]:
    """Starts what is missing, in the lowest free slots; a slot is taken until nothing is left of its last life.

    What drains because its node goes is missing already: its streams may take long, others want a replica meanwhile.
    """
    views = observed.of_model(model.name)
    taken = {r.replica.slot for r in views}
    going = [r for r in views if r.phase is ReplicaPhase.DRAINING and observed.leaving(r)]
    fenced = {s.incarnation.replica for s in observed.stale}
    starts: list[Action] = []
    missing = model.replicas - len(taken) + len(going)
    free = (slot for slot in range(model.replicas + len(taken)) if slot not in taken)
    for slot, _ in zip(free, range(missing), strict=False):
        replica = ReplicaId(model.name, slot)
        history = observed.slots.get(replica, SlotHistory())
        if replica in fenced or history.pauses(model.fingerprint, now_s):
            continue
        reason = f"rebuilt after {history.failures} failure(s)" if history.failures else "wanted"
        reason += f", the last: {history.cause}" if history.cause else ""
        starts.append(Start(Incarnation(replica, history.generation + 1), reason))
    return starts
