from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.domain.endpoint import Endpoint, EndpointTable, LoadSnapshot
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.domain.request import SamplingParams, SequenceEnd, TokenLogprob
from cluster.v1 import control_pb2, engine_pb2, inference_pb2
from cluster.wire import convert

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
token = st.integers(0, 2**32 - 1)


def f32(low: float, high: float, **bounds: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, allow_nan=False, **bounds)


sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**32 - 1),
    temperature=f32(0, 100),
    top_p=f32(0, 1, exclude_min=True),
    top_k=u32,
    min_p=f32(0, 1),
    seed=u64,
    repetition_penalty=f32(0, 10, exclude_min=True),
    presence_penalty=f32(-2, 2),
    frequency_penalty=f32(-2, 2),
    stop_token_ids=st.frozensets(token, max_size=5),
    min_tokens=u32,
    logit_bias=st.dictionaries(token, f32(-100, 100), max_size=5),
    logprobs=st.integers(0, 20),
)
logprob = st.builds(
    TokenLogprob, token, f32(-1000, 0), st.lists(st.tuples(token, f32(-1000, 0)), max_size=5).map(tuple)
)
name = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
endpoint = st.builds(
    Endpoint,
    incarnation=st.builds(Incarnation, st.builds(ReplicaId, name, u32), u64),
    address=name,
    checkpoint_digest=name,
    block_size=u32,
    draining=st.booleans(),
)
table = st.builds(
    EndpointTable, u64, st.lists(endpoint, max_size=4).map(tuple), st.lists(name, max_size=4).map(tuple)
)  # fmt: skip
load = st.builds(LoadSnapshot, u32, u32, u64, u32, u32)


@given(sampling)
def test_sampling_survives_the_wire(params: SamplingParams) -> None:
    message = convert.sampling_to_message(params)
    read = inference_pb2.Sampling.FromString(message.SerializeToString())
    assert convert.sampling_from_message(read, params.logprobs) == params


def test_an_empty_message_is_greedy_with_everything_off() -> None:
    params = convert.sampling_from_message(inference_pb2.Sampling(max_tokens=1))
    assert params == SamplingParams(max_tokens=1)


@given(logprob)
def test_logprobs_survive_the_wire(value: TokenLogprob) -> None:
    message = convert.logprob_to_message(value)
    assert convert.logprob_from_message(inference_pb2.TokenLogprobs.FromString(message.SerializeToString())) == value


@given(load)
def test_load_survives_the_wire(value: LoadSnapshot) -> None:
    message = convert.load_to_message(value)
    assert convert.load_from_message(engine_pb2.Load.FromString(message.SerializeToString())) == value


@given(table)
def test_endpoint_tables_survive_the_wire(value: EndpointTable) -> None:
    message = convert.endpoint_table_to_message(value)
    read = control_pb2.EndpointTable.FromString(message.SerializeToString())
    assert convert.endpoint_table_from_message(read) == value


@given(endpoint)
def test_the_identity_is_the_endpoints(value: Endpoint) -> None:
    identity = convert.identity_of(value)
    assert ReplicaId(identity.model, identity.slot) == value.incarnation.replica
    assert (identity.generation, identity.checkpoint_digest, identity.block_size) == (
        value.incarnation.generation,
        value.checkpoint_digest,
        value.block_size,
    )


def test_every_end_has_a_word_on_the_wire() -> None:
    words = [convert.end_to_message(end) for end in (None, *SequenceEnd)]
    assert sorted(words) == sorted(engine_pb2.SequenceEnd.values())
    assert [convert.end_from_message(word) for word in words] == [None, *SequenceEnd]
