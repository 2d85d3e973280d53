"""Where a request would go and why, as the service Routing says it."""

from __future__ import annotations

from cluster.router.fleet import Fleet
from cluster.router.policy.contracts import Demand
from cluster.router.policy.prompt_blocks import PromptBlocks
from cluster.router.policy.selector import Verdict
from cluster.router.validation import ValidRequest
from cluster.v1 import inference_pb2, routing_pb2


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
    return _explained(fleet, demand)


def unserved_explanation(
    fleet: Fleet, model: str, request: inference_pb2.GenerateRequest, session_key: str
) -> routing_pb2.RouteExplanation:
    """Why ``request`` finds nobody while no replica of ``model``, which is known, is up.

    What the model takes is not known then, nor its tokenizer: nothing is checked, and only token ids are counted.
    """
    demand = Demand(model=model, needs_room=True, prompt_tokens=len(request.token_ids.ids), session_key=session_key)
    return _explained(fleet, demand)


def _explained(fleet: Fleet, demand: Demand) -> routing_pb2.RouteExplanation:
    return routing_pb2.RouteExplanation(
        policy=fleet.profile.name,
        model=demand.model,
        prompt_tokens=demand.prompt_tokens,
        endpoints=[_endpoint(verdict) for verdict in fleet.explain(demand)],
    )


def _endpoint(verdict: Verdict) -> routing_pb2.EndpointVerdict:
    candidate, incarnation = verdict.candidate, verdict.candidate.endpoint.incarnation
    return routing_pb2.EndpointVerdict(
        replica=str(incarnation.replica),
        generation=incarnation.generation,
        address=candidate.endpoint.address,
        filters=[
            routing_pb2.FilterVerdict(name=name, passes=passes, required=required)
            for name, passes, required in verdict.filters
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
