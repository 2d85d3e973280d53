"""Keyword arguments to messages, and server errors to typed ones. Nothing here talks to anybody."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from cluster.domain.errors import (
    AbortReason,
    ClusterError,
    ConfigError,
    EngineFailed,
    ModelNotFound,
    RejectReason,
    RequestAborted,
    RequestEvicted,
    RequestRejected,
)
from cluster.v1 import inference_pb2
from cluster.wire.status import CallFailure

# Text, token ids, or the messages of a chat.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class Options(TypedDict, total=False):
    """How to sample, in the words of the API. Without any of them the model's own defaults hold."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: Sequence[str] | str
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    logit_bias: Mapping[int, float]


class Arguments(Options, total=False):
    """Everything that a client's ``generate`` takes beside the prompt."""

    model: str
    request_id: str
    logprobs: int
    priority: int
    cache_salt: str
    tenant: str
    session_id: str
    timeout_s: float | None
    generated_token_ids: Sequence[int]
    received_characters: int
    checkpoint_digest: str


def build_request(  # noqa: PLR0913 - the message's fields
    prompt: Prompt,
    options: Options,
    *,
    model: str = "",
    request_id: str = "",
    logprobs: int = 0,
    priority: int = 0,
    generated_token_ids: Sequence[int] = (),
    received_characters: int = 0,
    checkpoint_digest: str = "",
    cache_salt: str = "",
) -> inference_pb2.GenerateRequest:
    """The message for one request, with an id, and a seed wherever sampling is asked for.

    A request that names no seed gets one from its id at the router: the same id, sent again after a
    router broke, draws the same tokens. Token ids are always asked for: a resume needs them.
    """
    try:
        request = inference_pb2.GenerateRequest(
            request_id=request_id or uuid.uuid4().hex,
            model=model,
            logprobs=logprobs,
            priority=priority,
            return_token_ids=True,
            generated_token_ids=generated_token_ids,
            received_characters=received_characters,
            checkpoint_digest=checkpoint_digest,
            cache_salt=cache_salt,
        )
    except (TypeError, ValueError) as error:
        raise RequestRejected(
            RejectReason.INVALID, f"An argument of the request has a wrong value: {error}."
        ) from error
    _set_prompt(request, prompt)
    if options:
        _set_sampling(request.sampling, options)
        if request.sampling.temperature > 0 and "seed" not in options:
            request.sampling.seed = secrets.randbits(64)
    return request


def build_tokenize_request(prompt: Prompt, model: str, *, add_special_tokens: bool) -> inference_pb2.TokenizeRequest:
    """The message for the token ids of a text or a chat."""
    whole = build_request(prompt, {}, model=model)
    request = inference_pb2.TokenizeRequest(model=model, add_special_tokens=add_special_tokens)
    if whole.HasField("chat"):
        request.chat.CopyFrom(whole.chat)
    else:
        request.text = whole.text
    return request


def _set_sampling(sampling: inference_pb2.Sampling, options: Options) -> None:
    fields: dict[str, Any] = dict(options)
    if isinstance(options.get("stop"), str):
        fields["stop"] = [options["stop"]]
    known = inference_pb2.Sampling.DESCRIPTOR.fields_by_name
    for name, value in fields.items():
        if name not in known:
            message = f"There is no option {name!r}; the options for sampling are {', '.join(known)}."
            raise RequestRejected(RejectReason.INVALID, message)
        try:
            sampling.MergeFrom(inference_pb2.Sampling(**{name: value}))
        except (TypeError, ValueError) as error:
            message = f"The option {name} cannot be {value!r}: {error}."
            raise RequestRejected(RejectReason.INVALID, message) from error


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    chat, ids = inference_pb2.Chat(), inference_pb2.TokenIds()
    try:
        for item in prompt:
            if isinstance(item, Mapping):
                chat.messages.add(role=item.get("role", ""), content=item.get("content", ""))
            else:
                ids.ids.append(item)
    except (TypeError, ValueError) as error:
        message = f"A prompt is a text, token ids from 0 on, or messages with a role and a content: {error}."
        raise RequestRejected(RejectReason.INVALID, message) from error
    if chat.messages and ids.ids:
        raise RequestRejected(RejectReason.INVALID, "A prompt is either token ids or chat messages, not both.")
    if chat.messages:
        request.chat.CopyFrom(chat)
    else:
        request.token_ids.CopyFrom(ids)


def typed_error(
    code: str, reason: str, message: str, retry_after_s: float | None, address: str, *, started: bool
) -> ClusterError:
    """The domain error behind a gRPC status, ``code`` being its name."""
    match code:
        case "INVALID_ARGUMENT":
            return RequestRejected(RejectReason.INVALID, message)
        case "NOT_FOUND":
            return ModelNotFound(message)
        case "RESOURCE_EXHAUSTED":
            return RequestRejected(RejectReason.QUEUE_FULL, message, retry_after_s)
        case "CANCELLED":
            return RequestAborted(AbortReason.CLIENT, message)
        case "DEADLINE_EXCEEDED":
            late = "The deadline came before the last token."
            if not reason:  # grpc's own words, of a call that no router has answered
                message = f"The deadline came before an answer from {address}; allow the request more time."
            return RequestAborted(AbortReason.DEADLINE, late) if started else RequestEvicted(message)
        case "UNAVAILABLE":
            return _unavailable(reason, message, retry_after_s, address)
        case "UNIMPLEMENTED":
            return ConfigError(f"What answers at {address} is no router; check the address.")
        case _:
            return EngineFailed(f"{code}: {message}", retryable=False)


def error_of_call(failure: CallFailure, address: str) -> ClusterError:
    """The domain error of a single call that failed."""
    code, reason, message, retry_after_s = failure
    return typed_error(code.name, reason, message, retry_after_s, address, started=False)


def never_ready(address: str, timeout_s: float) -> RequestRejected:
    message = f"No model was ready at {address} within {timeout_s:g} s."
    return RequestRejected(RejectReason.NO_ENDPOINT, message)


def closed_before() -> RequestAborted:
    return RequestAborted(AbortReason.CLIENT, "This client was closed; open another one for further requests.")


def closed_meanwhile() -> RequestAborted:
    message = "The client was closed before the stream had ended; close it after its last stream."
    return RequestAborted(AbortReason.CLIENT, message)


def _unavailable(reason: str, message: str, retry_after_s: float | None, address: str) -> ClusterError:
    if reason == "REPLICA_FAILED":
        return EngineFailed(message, retryable=True)
    if reason == RejectReason.DRAINING.value:
        return RequestRejected(RejectReason.DRAINING, message, retry_after_s)
    if reason == RejectReason.NO_ENDPOINT.value:
        return RequestRejected(RejectReason.NO_ENDPOINT, message, retry_after_s)
    text = f"No router answers at {address}; start one with `llm-cluster serve`, or pass another address."
    return RequestRejected(RejectReason.NO_ENDPOINT, text, retry_after_s)
