"""Who may serve a request at all."""

from __future__ import annotations

from cluster.router.endpoint_table import Standing
from cluster.router.policy.contracts import Filter

SERVES_MODEL = Filter("serves_model", lambda candidate, demand: candidate.endpoint.model == demand.model, static=True)
SESSION_UP = Filter("session_up", lambda candidate, _: candidate.session_up, static=True)
NOT_DRAINING = Filter("not_draining", lambda candidate, _: not candidate.endpoint.draining, static=True)
SAME_CHECKPOINT = Filter(
    "same_checkpoint",
    lambda candidate, demand: demand.checkpoint_digest in ("", candidate.endpoint.checkpoint_digest),
    static=True,
)
# An incarnation's hash costs more than the rest of a filter: nobody computes it for an empty set.
NOT_REFUSED = Filter(
    "not_refused",
    lambda candidate, demand: not demand.refused or candidate.endpoint.incarnation not in demand.refused,
)
HAS_ROOM = Filter("has_room", lambda candidate, demand: candidate.has_room or not demand.needs_room)
NOT_EJECTED = Filter("not_ejected", lambda candidate, _: candidate.standing is not Standing.EJECTED, required=False)
NOT_FAILED = Filter(
    "not_failed",
    lambda candidate, demand: not demand.failed or candidate.endpoint.incarnation not in demand.failed,
    required=False,
)
NOT_SLOW = Filter("not_slow", lambda candidate, _: candidate.standing is not Standing.SLOW, required=False)
NOT_FULL = Filter("not_full", lambda candidate, _: candidate.has_room, required=False)
