"""Where a request would go and why, as the service Routing says it."""

from __future__ import annotations

from cluster.router.fleet import Fleet
from cluster.router.policy.contracts import Demand, Profile
from cluster.router.policy.prompt_blocks import PromptBlocks
from cluster.router.policy.selector import Verdict
from cluster.router.validation import ValidRequest
from cluster.v1 import routing_pb2


def route_explanation(fleet: Fleet, request: ValidRequest, checkpoint_digest: str) -> routing_pb2.RouteExplanation:
    """Where ``request`` would go if it came now and nobody waited; changes nothing."""
    demand = Demand(
        model=request.model,
        checkpoint_digest=checkpoint_digest,
        needs_room=True,
        prompt_tokens=len(request.prompt_token_ids),
        blocks=PromptBlocks(request.prompt_token_ids, request.cache_salt),
        session_key=request.session_key,
    )
    return routing_pb2.RouteExplanation(
        policy=fleet.profile.name,
        model=request.model,
        prompt_tokens=len(request.prompt_token_ids),
        endpoints=[_endpoint(verdict, fleet.profile) for verdict in fleet.explain(demand)],
    )


def _endpoint(verdict: Verdict, profile: Profile) -> routing_pb2.EndpointVerdict:
    candidate, incarnation = verdict.candidate, verdict.candidate.endpoint.incarnation
    required = {rule.name: rule.required for rule in profile.filters}
    return routing_pb2.EndpointVerdict(
        replica=str(incarnation.replica),
        generation=incarnation.generation,
        address=candidate.endpoint.address,
        filters=[
            routing_pb2.FilterVerdict(name=name, passes=passes, required=required[name])
            for name, passes in verdict.filters
        ],
        scores=[
            routing_pb2.ScorerVerdict(name=name, weight=weight, score=score) for name, weight, score in verdict.scores
        ],
        total=verdict.total,
        qualifies=verdict.qualifies,
        tokens=candidate.tokens,
        queued_tokens=candidate.queued_tokens,
        cached_tokens=candidate.cached_tokens,
        standing=candidate.standing.name,
        looked_at=verdict.looked_at,
        taken=verdict.taken,
    )
