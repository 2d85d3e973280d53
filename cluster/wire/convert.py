"""Message <-> domain value, both ways, for everything that two components exchange."""

from __future__ import annotations

from operator import attrgetter

from cluster.domain.endpoint import Endpoint, EndpointTable, LoadSnapshot
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.domain.request import SamplingParams, SequenceEnd, TokenLogprob
from cluster.v1 import control_pb2, engine_pb2, inference_pb2

_END_TO_MESSAGE = {
    SequenceEnd.STOP: engine_pb2.SEQUENCE_END_STOP,
    SequenceEnd.LENGTH: engine_pb2.SEQUENCE_END_LENGTH,
    SequenceEnd.CANCELLED: engine_pb2.SEQUENCE_END_CANCELLED,
    SequenceEnd.REJECTED_CAPACITY: engine_pb2.SEQUENCE_END_REJECTED_CAPACITY,
    SequenceEnd.REJECTED_INVALID: engine_pb2.SEQUENCE_END_REJECTED_INVALID,
    SequenceEnd.REJECTED_DRAINING: engine_pb2.SEQUENCE_END_REJECTED_DRAINING,
    SequenceEnd.EVICTED_DEADLINE: engine_pb2.SEQUENCE_END_EVICTED_DEADLINE,
    SequenceEnd.ABORTED_DEADLINE: engine_pb2.SEQUENCE_END_ABORTED_DEADLINE,
}
_END_FROM_MESSAGE = {message: end for end, message in _END_TO_MESSAGE.items()}
_load_fields = attrgetter(*LoadSnapshot._fields)  # the message's are called alike


def sampling_to_message(params: SamplingParams) -> inference_pb2.Sampling:
    """Every field set, so that the engine resolves no default."""
    message = inference_pb2.Sampling(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        min_tokens=params.min_tokens,
    )
    # What is mostly empty is left alone: a map costs ten times all the other fields.
    if params.stop_token_ids:
        message.stop_token_ids.extend(sorted(params.stop_token_ids))
    for token_id, bias in params.logit_bias.items():
        message.logit_bias[token_id] = bias
    return message


def sampling_from_message(message: inference_pb2.Sampling, logprobs: int = 0) -> SamplingParams:
    """The inverse; zero top_p and repetition_penalty mean 1. Bounds are the router's to check first."""
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        repetition_penalty=message.repetition_penalty or 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        stop_token_ids=frozenset(message.stop_token_ids),
        min_tokens=message.min_tokens,
        logit_bias=dict(message.logit_bias),
        logprobs=logprobs,
    )


def logprob_to_message(value: TokenLogprob) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        token_id=value.token_id,
        logprob=value.logprob,
        top=[inference_pb2.TopLogprob(token_id=t, logprob=p) for t, p in value.top],
    )


def logprob_from_message(message: inference_pb2.TokenLogprobs) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, tuple((t.token_id, t.logprob) for t in message.top))


def end_to_message(end: SequenceEnd | None) -> engine_pb2.SequenceEnd:
    return engine_pb2.SEQUENCE_END_UNSPECIFIED if end is None else _END_TO_MESSAGE[end]


def end_from_message(message: engine_pb2.SequenceEnd) -> SequenceEnd | None:
    """None while the sequence goes on."""
    return _END_FROM_MESSAGE.get(message)


def load_to_message(load: LoadSnapshot) -> engine_pb2.Load:
    return engine_pb2.Load(
        running_sequences=load.running_sequences,
        waiting_sequences=load.waiting_sequences,
        queued_prompt_tokens=load.queued_prompt_tokens,
        kv_blocks_used=load.kv_blocks_used,
        kv_blocks_total=load.kv_blocks_total,
    )


def load_from_message(message: engine_pb2.Load) -> LoadSnapshot:
    return LoadSnapshot._make(_load_fields(message))


def identity_of(endpoint: Endpoint) -> engine_pb2.ReplicaIdentity:
    """What a router expects to meet at ``endpoint``."""
    return engine_pb2.ReplicaIdentity(
        model=endpoint.model,
        slot=endpoint.incarnation.replica.slot,
        generation=endpoint.incarnation.generation,
        checkpoint_digest=endpoint.checkpoint_digest,
        block_size=endpoint.block_size,
    )


def endpoint_table_to_message(table: EndpointTable) -> control_pb2.EndpointTable:
    return control_pb2.EndpointTable(
        epoch=table.epoch,
        state_id=table.state_id,
        models=list(table.models),
        endpoints=[
            control_pb2.Endpoint(
                model=e.model,
                slot=e.incarnation.replica.slot,
                generation=e.incarnation.generation,
                address=e.address,
                checkpoint_digest=e.checkpoint_digest,
                block_size=e.block_size,
                draining=e.draining,
            )
            for e in table.endpoints
        ],
    )


def endpoint_table_from_message(message: control_pb2.EndpointTable) -> EndpointTable:
    return EndpointTable(
        epoch=message.epoch,
        state_id=message.state_id,
        models=tuple(message.models),
        endpoints=tuple(
            Endpoint(
                incarnation=Incarnation(ReplicaId(e.model, e.slot), e.generation),
                address=e.address,
                checkpoint_digest=e.checkpoint_digest,
                block_size=e.block_size,
                draining=e.draining,
            )
            for e in message.endpoints
        ),
    )
