"""What the router makes of a client's bytes: a message that holds what it says, or a sentence."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import psutil
import pytest
from google.protobuf.message import Message

from cluster.router.inference_service import BOUNDS, DECODERS, LOOKED_AT_BYTES
from cluster.router.validation import CHAT_MESSAGES_MAX, LOGIT_BIAS_MAX, STOP_TOKENS_MAX, STOPS_MAX
from cluster.v1 import inference_pb2
from tests.contract.fuzzing import part, varint

MB = 2**20
KEPT = 60
ALL_METHODS = ("Generate", "Complete", "ExplainRoute", "Tokenize", "ListModels")
UNKNOWN = b"\xfa\x7f"  # the tag of a field 2047, with a length


def unknown(size: int) -> bytes:
    return UNKNOWN + varint(size) + bytes(size)


def decoded(method: str, raw: bytes) -> Message:
    made = DECODERS[method](raw)
    assert isinstance(made, Message), made
    return made


def refused(method: str, raw: bytes) -> str:
    made = DECODERS[method](raw)
    assert isinstance(made, str), type(made)
    return made


def growth(*, kept: Sequence[bytes]) -> int:
    """Bytes that the process grows by when it keeps what ``kept`` is decoded to."""
    decoded("Generate", kept[0])
    gc.collect()
    before: int = psutil.Process().memory_info().rss
    messages = [decoded("Generate", raw) for raw in kept]
    after: int = psutil.Process().memory_info().rss
    assert len(messages) == len(kept)
    return after - before


def test_a_message_is_what_it_was_when_it_was_sent() -> None:
    sent = inference_pb2.GenerateRequest(
        request_id="r", text="ä" * 100_000, return_token_ids=True, generated_token_ids=[1, 2], priority=-3,
        sampling=inference_pb2.Sampling(seed=0, stop=["x", ""], logit_bias={3: -1.5}),
    )  # fmt: skip
    assert decoded("Generate", sent.SerializeToString()) == sent
    assert decoded("Generate", b"") == inference_pb2.GenerateRequest()
    assert decoded("ListModels", b"") == inference_pb2.ListModelsRequest()


def test_the_largest_valid_request_is_taken() -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="x" * 100)] * CHAT_MESSAGES_MAX)
    sampling = inference_pb2.Sampling(
        max_tokens=1, temperature=1, top_p=1, top_k=1, min_p=0.5, seed=1, repetition_penalty=1, presence_penalty=1,
        frequency_penalty=1, ignore_eos=True, min_tokens=1, stop=["x"] * STOPS_MAX,
        stop_token_ids=range(STOP_TOKENS_MAX), logit_bias=dict.fromkeys(range(LOGIT_BIAS_MAX), 1.0),
    )  # fmt: skip
    sent = inference_pb2.GenerateRequest(chat=chat, sampling=sampling, generated_token_ids=[150_000] * 1_000_000)
    raw = sent.SerializeToString()
    assert decoded("Generate", raw) == sent
    raw = inference_pb2.TokenizeRequest(chat=chat).SerializeToString()
    assert len(raw) > LOOKED_AT_BYTES
    decoded("Tokenize", raw)
    raw = inference_pb2.GenerateRequest(text="x" * 16 * MB).SerializeToString()
    decoded("Generate", raw)


@pytest.mark.parametrize("method", ["Generate", "Complete", "ExplainRoute"])
def test_what_holds_too_much_is_not_decoded(method: str) -> None:
    chat = part(5, b"\x0a\x00" * (MB // 2))
    assert f"more than {BOUNDS.fields} fields such as Chat.messages" in refused(method, chat)
    ids = part(4, part(1, bytes(BOUNDS.numbers + 1)))
    assert f"more than {BOUNDS.numbers} numbers such as TokenIds.ids" in refused(method, ids)
    generated = b"\x38\x01" * (BOUNDS.fields + LOOKED_AT_BYTES)
    assert "GenerateRequest.generated_token_ids" in refused(method, generated)
    biases = part(6, part(14, b"\x08\x01\x15\0\0\0\0") * MB)
    assert "such as Sampling.logit_bias in" in refused(method, biases)


def test_what_holds_too_much_to_tokenize_is_not_decoded() -> None:
    assert "fields such as Chat.messages" in refused("Tokenize", part(3, b"\x0a\x00" * (MB // 2)))


@pytest.mark.parametrize("method", ALL_METHODS)
def test_unknown_fields_are_bounded_and_dropped(method: str) -> None:
    empty = decoded(method, b"")
    assert decoded(method, unknown(LOOKED_AT_BYTES - 5)) == empty  # as long as may be with its tag and its length
    assert f"more than {LOOKED_AT_BYTES} bytes of fields that its proto does not have" in refused(
        method, unknown(LOOKED_AT_BYTES)
    )


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("length", [1, LOOKED_AT_BYTES + 1])
def test_what_is_no_message_is_told_so(method: str, length: int) -> None:
    name = {"Tokenize": "TokenizeRequest", "ListModels": "ListModelsRequest"}.get(method, "GenerateRequest")
    told = f"The message is no {name} of cluster.v1; send one that was made from its protos."
    assert refused(method, b"\xff" * length) == told


def test_a_message_keeps_nothing_in_memory_that_does_not_count() -> None:
    ids = part(4, part(1, b"\x01\x02"))
    replaced = part(3, b"x" * MB) + ids
    assert growth(kept=[replaced] * KEPT) < KEPT * MB / 4
    others = part(5, b"\x0a\x00" * (LOOKED_AT_BYTES // 2 - 10)) + ids  # 30 times as much when it is decoded
    assert len(others) <= LOOKED_AT_BYTES
    assert growth(kept=[others] * KEPT) < KEPT * MB / 4
    assert growth(kept=[ids + unknown(LOOKED_AT_BYTES - 12)] * 8 * KEPT) < KEPT * MB / 8
