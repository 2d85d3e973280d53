"""Every bound of a request, checked before anything is done; pure.

``check_fields`` needs no tokens and runs first, so that nothing is tokenized for a request that is wrong
anyway; ``resolve`` needs the prompt's tokens and yields what an engine can be asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from operator import attrgetter, le
from typing import NamedTuple

from cluster.domain.errors import RejectReason, RequestRejected
from cluster.domain.request import SamplingParams
from cluster.v1 import engine_pb2, inference_pb2
from cluster.wire.caller import SESSION_KEY, TENANT_KEY

REQUEST_ID_MAX = 256
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
STOP_TOKENS_MAX = 64
LOGIT_BIAS_MAX = 1024
LOGPROBS_MAX = 20
TENANT_MAX = 64
SESSION_KEY_MAX = 256
CACHE_SALT_MAX = 256
CHAT_MESSAGES_MAX = 4096

# field -> (lowest, highest); zero always means "off" and is inside.
_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_numbers = attrgetter(*_RANGES)
_LOWEST, _HIGHEST = zip(*_RANGES.values(), strict=True)


class ValidRequest(NamedTuple):
    """A request that can be run: every default resolved, every bound checked.

    ``session_key`` names the conversation it belongs to, for policies that keep one together.
    ``tenant``: whom admission counts it for.
    ``resumed_token_ids`` were generated before this call, and ``received_characters`` of text came with them.
    ``max_tokens`` in ``sampling`` counts them. ``movable``: no token of it is known yet, so it may be served by any
    checkpoint of its model, tokenized anew.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    resumed_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stops: tuple[str, ...]
    priority: int
    return_token_ids: bool
    cache_salt: str = ""
    received_characters: int = 0
    session_key: str = ""
    tenant: str = ""
    movable: bool = False


def check_request_id(request_id: str) -> None:
    if len(request_id) > REQUEST_ID_MAX or not (request_id.isascii() and request_id.isprintable()):
        raise _invalid(f"request_id must be at most {REQUEST_ID_MAX} printable ASCII characters.")


def check_caller(tenant: str, session_key: str) -> None:
    """Of the call's metadata, which name them."""
    if len(tenant) > TENANT_MAX or not tenant.isprintable():
        raise _invalid(f"{TENANT_KEY} must be at most {TENANT_MAX} printable characters.")
    if len(session_key) > SESSION_KEY_MAX:
        raise _invalid(f"{SESSION_KEY} must be at most {SESSION_KEY_MAX} characters.")


def check_fields(
    request: inference_pb2.GenerateRequest, card: engine_pb2.ModelCard, *, has_tokenizer: bool
) -> inference_pb2.Sampling:
    """The Sampling in force: the request's, or the model's defaults when it has none; RequestRejected INVALID."""
    sampling = request.sampling if request.HasField("sampling") else card.default_sampling
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise _invalid("The request has no prompt; set text, token_ids or chat.")
    if kind in ("text", "chat") and not has_tokenizer:
        raise _invalid(f"Model {card.name} has no tokenizer, so it takes no {kind}; send the prompt as token_ids.")
    if kind == "chat":
        check_chat(request.chat)
    if kind == "token_ids":
        _check_prompt_tokens(len(request.token_ids.ids), card)  # before they are looked at: there may be millions
        _check_token_ids("token_ids", request.token_ids.ids, card.vocab_size)
    if len(request.generated_token_ids) > card.max_model_len:  # turning them into text takes a while for each
        raise _invalid(
            f"There are {len(request.generated_token_ids)} generated_token_ids and model {card.name} takes "
            f"{card.max_model_len} tokens; send those that were received."
        )
    _check_token_ids("generated_token_ids", request.generated_token_ids, card.vocab_size)
    if len(request.cache_salt) > CACHE_SALT_MAX:
        raise _invalid(f"cache_salt has {len(request.cache_salt)} characters; at most {CACHE_SALT_MAX} are allowed.")
    if request.logprobs > LOGPROBS_MAX:
        raise _invalid(f"logprobs is {request.logprobs}; at most {LOGPROBS_MAX} are given per token.")
    _check_numbers(sampling, card.vocab_size)
    if sampling.stop or sampling.stop_token_ids:
        _check_stops(sampling, card, has_tokenizer=has_tokenizer)
    if sampling.logit_bias:
        _check_logit_bias(sampling, card.vocab_size)
    return sampling


def check_chat(chat: inference_pb2.Chat) -> None:
    if not chat.messages:
        raise _invalid("The chat has no messages; add at least one with a role and a content.")
    if len(chat.messages) > CHAT_MESSAGES_MAX:
        raise _invalid(f"The chat has {len(chat.messages)} messages; at most {CHAT_MESSAGES_MAX} are allowed.")
    if not all(message.role for message in chat.messages):
        raise _invalid("Every chat message needs a role, such as user or assistant.")


def check_text_length(text: str, longest_token_characters: int, card: engine_pb2.ModelCard) -> None:
    """Refuses a text that cannot possibly fit, without tokenizing it."""
    _check_characters(len(text), longest_token_characters, card)


def check_chat_length(chat: inference_pb2.Chat, longest_token_characters: int, card: engine_pb2.ModelCard) -> None:
    """Refuses a chat whose words alone cannot possibly fit, without rendering it."""
    _check_characters(sum(len(m.role) + len(m.content) for m in chat.messages), longest_token_characters, card)


def _check_characters(characters: int, longest_token_characters: int, card: engine_pb2.ModelCard) -> None:
    least_tokens = characters // max(1, longest_token_characters)
    if least_tokens > card.max_model_len:
        raise _invalid(
            f"The prompt has at least {least_tokens} tokens and model {card.name} takes {card.max_model_len}; "
            "shorten the prompt."
        )


def resolve(
    request: inference_pb2.GenerateRequest,
    request_id: str,
    sampling: inference_pb2.Sampling,
    card: engine_pb2.ModelCard,
    prompt_token_ids: Iterable[int],
    *,
    tenant: str = "",
    session_key: str = "",
) -> ValidRequest:
    """Lengths checked and every default filled in; RequestRejected INVALID."""
    prompt = tuple(prompt_token_ids)
    max_tokens = _max_tokens(sampling.max_tokens, len(prompt), card)
    if sampling.min_tokens > max_tokens:
        raise _invalid(f"min_tokens is {sampling.min_tokens} and max_tokens {max_tokens}; it cannot be larger.")
    ends = () if sampling.ignore_eos else card.end_token_ids
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed if sampling.HasField("seed") else derived_seed(request_id),
        repetition_penalty=sampling.repetition_penalty or 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        stop_token_ids=frozenset((*sampling.stop_token_ids, *ends)),
        min_tokens=sampling.min_tokens,
        logit_bias=dict(sampling.logit_bias) if sampling.logit_bias else {},
        logprobs=request.logprobs,
    )
    return ValidRequest(
        request_id=request_id,
        model=card.name,
        prompt_token_ids=prompt,
        resumed_token_ids=tuple(request.generated_token_ids),
        sampling=params,
        stops=tuple(sampling.stop),
        priority=request.priority,
        return_token_ids=request.return_token_ids,
        cache_salt=request.cache_salt,
        received_characters=request.received_characters,
        session_key=session_key,
        tenant=tenant,
        movable=not (request.generated_token_ids or request.checkpoint_digest),
    )


def derived_seed(request_id: str) -> int:
    """The seed of a request that names none: the same id draws the same tokens."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big")


def _max_tokens(asked: int, prompt_tokens: int, card: engine_pb2.ModelCard) -> int:
    _check_prompt_tokens(prompt_tokens, card)
    room = card.max_model_len - prompt_tokens
    if asked > room:
        raise _invalid(
            f"The prompt's {prompt_tokens} tokens and max_tokens {asked} make {prompt_tokens + asked}, and model "
            f"{card.name} takes {card.max_model_len}; shorten the prompt or ask for at most {room} tokens."
        )
    return asked or room


def _check_prompt_tokens(prompt_tokens: int, card: engine_pb2.ModelCard) -> None:
    """There is a prompt, and room for a token behind it."""
    if prompt_tokens == 0:
        raise _invalid("The prompt is empty; send at least one token.")
    if prompt_tokens >= card.max_model_len:
        raise _invalid(
            f"The prompt has {prompt_tokens} tokens and model {card.name} takes {card.max_model_len} for prompt and "
            "output together; shorten the prompt."
        )


def _check_numbers(sampling: inference_pb2.Sampling, vocab_size: int) -> None:
    values = _numbers(sampling)
    if not (all(map(le, _LOWEST, values)) and all(map(le, values, _HIGHEST))):  # false for NaN too
        raise _out_of_range(values)
    if sampling.top_k > vocab_size:
        raise _invalid(f"top_k is {sampling.top_k}; the vocabulary has only {vocab_size} tokens.")


def _out_of_range(values: Sequence[float]) -> RequestRejected:
    """Names the first of ``_RANGES`` that is."""
    ranges = zip(_RANGES.items(), values, strict=True)
    field, lowest, highest, value = next((f, lo, hi, v) for (f, (lo, hi)), v in ranges if not lo <= v <= hi)
    return _invalid(f"{field} is {value:g}; it must be between {lowest:g} and {highest:g}.")


def _check_stops(sampling: inference_pb2.Sampling, card: engine_pb2.ModelCard, *, has_tokenizer: bool) -> None:
    if sampling.stop and not has_tokenizer:
        raise _invalid(f"Model {card.name} has no tokenizer, so it knows no stop strings; use stop_token_ids.")
    if len(sampling.stop) > STOPS_MAX:
        raise _invalid(f"There are {len(sampling.stop)} stop strings; at most {STOPS_MAX} are allowed.")
    if not all(1 <= len(stop) <= STOP_CHARACTERS_MAX for stop in sampling.stop):
        raise _invalid(f"A stop string must have 1 to {STOP_CHARACTERS_MAX} characters.")
    if len(sampling.stop_token_ids) > STOP_TOKENS_MAX:
        raise _invalid(f"There are {len(sampling.stop_token_ids)} stop_token_ids; at most {STOP_TOKENS_MAX} may be.")
    _check_token_ids("stop_token_ids", sampling.stop_token_ids, card.vocab_size)


def _check_logit_bias(sampling: inference_pb2.Sampling, vocab_size: int) -> None:
    if len(sampling.logit_bias) > LOGIT_BIAS_MAX:
        raise _invalid(f"logit_bias has {len(sampling.logit_bias)} entries; at most {LOGIT_BIAS_MAX} are allowed.")
    _check_token_ids("logit_bias", sampling.logit_bias, vocab_size)
    for token_id, bias in sampling.logit_bias.items():
        if not (math.isfinite(bias) and -100.0 <= bias <= 100.0):
            raise _invalid(f"logit_bias of token {token_id} is {bias:g}; it must be between -100 and 100.")


def _check_token_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    highest = max(token_ids, default=0)
    if highest >= vocab_size:
        raise _invalid(f"{field} holds token {highest}; the vocabulary ends at {vocab_size - 1}.")


def _invalid(message: str) -> RequestRejected:
    return RequestRejected(RejectReason.INVALID, message)
