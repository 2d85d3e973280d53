"""Every bound of a request."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.domain.errors import RejectReason, RequestRejected
from cluster.router.validation import (
    ValidRequest,
    check_chat,
    check_chat_length,
    check_fields,
    check_request_id,
    check_text_length,
    derived_seed,
    resolve,
)
from cluster.v1 import engine_pb2, inference_pb2

NAN, INF = float("nan"), float("inf")
CARD = engine_pb2.ModelCard(name="demo", max_model_len=32, vocab_size=100, end_token_ids=[7])


def validate(
    has_tokenizer: bool = True, prompt: list[int] | None = None, card: Any = CARD, **fields: Any
) -> ValidRequest:
    request_fields = ("generated_token_ids", "logprobs", "priority", "return_token_ids", "text", "chat", "cache_salt")
    on_request = {name: fields.pop(name) for name in request_fields if name in fields}
    request = inference_pb2.GenerateRequest(**on_request)
    if request.WhichOneof("prompt") is None and prompt != []:
        request.token_ids.ids.extend(prompt or [1, 2, 3])
    elif prompt == []:
        request.token_ids.CopyFrom(inference_pb2.TokenIds())
    if fields:
        request.sampling.CopyFrom(inference_pb2.Sampling(**fields))
    sampling = check_fields(request, card, has_tokenizer=has_tokenizer)
    return resolve(request, "id", sampling, card, request.token_ids.ids or prompt or ())


BAD = [
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [100]}, "token 100"),
    ({"prompt": [1] * 32}, "32 tokens"),
    ({"prompt": [1] * 30, "max_tokens": 3}, "30 tokens and max_tokens 3 make 33"),
    ({"generated_token_ids": [100]}, "generated_token_ids"),
    ({"generated_token_ids": [1] * 33}, "33 generated_token_ids"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 100.5}, "temperature"),
    ({"temperature": NAN}, "temperature"),
    ({"temperature": INF}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": -0.01}, "top_p"),
    ({"top_p": NAN}, "top_p"),
    ({"min_p": 1.01}, "min_p"),
    ({"min_p": -0.01}, "min_p"),
    ({"repetition_penalty": -1.0}, "repetition_penalty"),
    ({"repetition_penalty": 101.0}, "repetition_penalty"),
    ({"repetition_penalty": INF}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"presence_penalty": NAN}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"top_k": 101}, "top_k"),
    ({"logprobs": 21}, "logprobs"),
    ({"cache_salt": "s" * 257}, "cache_salt has 257 characters"),
    ({"stop": ["x"] * 17}, "17 stop strings"),
    ({"stop": [""]}, "1 to 256"),
    ({"stop": ["x" * 257]}, "1 to 256"),
    ({"stop": ["x"], "has_tokenizer": False}, "stop_token_ids"),
    ({"text": "hello", "has_tokenizer": False}, "token_ids"),
    ({"chat": inference_pb2.Chat()}, "no messages"),
    ({"chat": inference_pb2.Chat(messages=[inference_pb2.ChatMessage(content="x")])}, "role"),
    ({"stop_token_ids": [1] * 65}, "65 stop_token_ids"),
    ({"stop_token_ids": [100]}, "stop_token_ids"),
    ({"logit_bias": {100: 1.0}}, "logit_bias"),
    ({"logit_bias": {1: 101.0}}, "logit_bias"),
    ({"logit_bias": {1: NAN}}, "logit_bias"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ({"min_tokens": 30}, "min_tokens"),
]


@pytest.mark.parametrize(("fields", "names"), BAD, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_refused_in_one_sentence(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        validate(**fields)
    assert caught.value.reject_reason is RejectReason.INVALID
    assert names in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1] * 31},
        {"prompt": [1] * 30, "max_tokens": 2},
        {"temperature": 100.0, "top_p": 1.0, "min_p": 1.0, "top_k": 100},
        {"repetition_penalty": 100.0, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"logprobs": 20, "stop": ["x" * 256] * 16, "stop_token_ids": [99] * 64},
        {"logit_bias": {99: -100.0, 0: 100.0}},
        {"max_tokens": 5, "min_tokens": 5},
    ],
)
def test_every_bound_itself_is_allowed(fields: dict[str, Any]) -> None:
    assert validate(**fields).model == "demo"


class Untouchable:
    """As many ids as somebody may send, of which none may be looked at."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("it was read")


@pytest.mark.parametrize("count", [32, 60_000_000])
def test_a_prompt_that_is_too_long_is_refused_before_its_ids_are_read(count: int) -> None:
    message = f"The prompt has {count} tokens and model demo takes 32 for prompt and output together"

    class Request:
        token_ids = SimpleNamespace(ids=Untouchable(count))
        HasField = staticmethod(lambda _field: False)
        WhichOneof = staticmethod(lambda _name: "token_ids")

    with pytest.raises(RequestRejected, match=message) as caught:
        check_fields(Request(), CARD, has_tokenizer=True)
    assert caught.value.reject_reason is RejectReason.INVALID


def test_too_many_biases() -> None:
    card = engine_pb2.ModelCard(name="demo", max_model_len=32, vocab_size=2000)
    assert validate(card=card, logit_bias=dict.fromkeys(range(1024), 1.0))
    with pytest.raises(RequestRejected, match="1025 entries"):
        validate(card=card, logit_bias=dict.fromkeys(range(1025), 1.0))


def test_a_request_without_a_prompt() -> None:
    with pytest.raises(RequestRejected, match="no prompt"):
        check_fields(inference_pb2.GenerateRequest(), CARD, has_tokenizer=True)


@pytest.mark.parametrize("request_id", ["", "x" * 256, "a b~"])
def test_good_ids(request_id: str) -> None:
    check_request_id(request_id)


@pytest.mark.parametrize("request_id", ["x" * 257, "tab\t", "ä", "\x7f"])
def test_bad_ids(request_id: str) -> None:
    with pytest.raises(RequestRejected, match="request_id"):
        check_request_id(request_id)


def test_every_default_is_resolved() -> None:
    params = validate(temperature=0.0).sampling
    assert (params.max_tokens, params.top_p, params.repetition_penalty) == (29, 1.0, 1.0)
    assert params.greedy
    assert params.stop_token_ids == {7}
    assert params.seed == derived_seed("id") == int("a56145270ce6b3be", 16)


def test_fields_of_the_request_win() -> None:
    valid = validate(seed=0, ignore_eos=True, stop_token_ids=[4], stop=["x"], priority=-3, logprobs=2, cache_salt="ä")
    assert valid.cache_salt == "ä"
    assert valid.sampling.seed == 0
    assert valid.sampling.stop_token_ids == {4}
    assert (valid.stops, valid.priority, valid.sampling.logprobs) == (("x",), -3, 2)


def test_the_models_defaults_hold_only_without_a_sampling_message() -> None:
    card = engine_pb2.ModelCard()
    card.CopyFrom(CARD)
    card.default_sampling.CopyFrom(inference_pb2.Sampling(temperature=0.5))
    assert validate(card=card).sampling.temperature == 0.5
    assert validate(card=card, max_tokens=3).sampling.greedy


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    check_text_length("x" * 329, 10, CARD)
    with pytest.raises(RequestRejected, match="at least 33 tokens"):
        check_text_length("x" * 330, 10, CARD)


def test_a_chat_is_bounded_before_it_is_rendered() -> None:
    def chat(messages: int, characters: int) -> inference_pb2.Chat:
        message = inference_pb2.ChatMessage(role="user", content="x" * characters)
        return inference_pb2.Chat(messages=[message] * messages)

    check_chat(chat(4096, 0))
    with pytest.raises(RequestRejected, match="4097 messages"):
        check_chat(chat(4097, 0))
    check_chat_length(chat(2, 160), 10, CARD)  # with its roles 328 characters: 32 tokens at least
    with pytest.raises(RequestRejected, match="at least 33 tokens"):
        check_chat_length(chat(2, 161), 10, CARD)
