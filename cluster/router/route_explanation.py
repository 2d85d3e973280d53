"""Adapter: the Routing service, which says where a request would go and why."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from cluster.router.fleet import Fleet
from cluster.router.policy.contracts import Demand, Profile
from cluster.router.policy.prompt_blocks import PromptBlocks
from cluster.router.policy.selector import Verdict
from cluster.router.validation import ValidRequest
from cluster.v1 import inference_pb2, routing_pb2, routing_pb2_grpc

Explain = Callable[[inference_pb2.GenerateRequest, Any], Awaitable[routing_pb2.RouteExplanation]]


class RoutingService(routing_pb2_grpc.RoutingServicer):
    """``explain`` validates the request and ends the call with a typed status where it must."""

    def __init__(self, explain: Explain) -> None:
        self._explain = explain

    async def ExplainRoute(  # noqa: N802 - the service's name
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> routing_pb2.RouteExplanation:
        return await self._explain(request, context)


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
        tokens=candidate.tokens,
        queued_tokens=candidate.queued_tokens,
        cached_tokens=candidate.cached_tokens,
        standing=candidate.standing.name,
        looked_at=verdict.looked_at,
        taken=verdict.taken,
    )
