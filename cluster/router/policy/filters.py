"""Who may serve a request at all."""

from __future__ import annotations

from cluster.router.policy.contracts import Filter

SERVES_MODEL = Filter("serves_model", lambda candidate, demand: candidate.endpoint.model == demand.model)
SESSION_UP = Filter("session_up", lambda candidate, _: candidate.session_up)
NOT_DRAINING = Filter("not_draining", lambda candidate, _: not candidate.endpoint.draining)
SAME_CHECKPOINT = Filter(
    "same_checkpoint",
    lambda candidate, demand: demand.checkpoint_digest in ("", candidate.endpoint.checkpoint_digest),
)
NOT_REFUSED = Filter("not_refused", lambda candidate, demand: candidate.endpoint.incarnation not in demand.refused)
NOT_FAILED = Filter(
    "not_failed", lambda candidate, demand: candidate.endpoint.incarnation not in demand.failed, required=False
)
