"""Adapter: who answers at an endpoint's address, and what it serves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from cluster.domain.endpoint import Endpoint
from cluster.router.tokenization import Tokenizer
from cluster.router.tokenizer_cache import TokenizerCache
from cluster.v1 import engine_pb2, engine_pb2_grpc
from cluster.wire import convert


class HandshakeRefused(Exception):  # noqa: N818 - stays inside the session
    """Somebody else than expected answers at the endpoint's address."""


def check_welcome(message: engine_pb2.SessionResponse | object, endpoint: Endpoint) -> None:
    """HandshakeRefused unless ``message`` is the welcome of ``endpoint`` itself: replica, generation and weights."""
    if not isinstance(message, engine_pb2.SessionResponse) or not message.HasField("welcome"):
        raise HandshakeRefused("the engine ended the session without a welcome")
    _check_identity(message.welcome.identity, endpoint)


async def describe(
    stub: engine_pb2_grpc.EngineStub, endpoint: Endpoint, tokenizers: TokenizerCache
) -> tuple[engine_pb2.ModelCard, Tokenizer | None]:
    """The card, and the tokenizer by its digest, if there is one: its files travel once per checkpoint.

    HandshakeRefused, CheckpointError or an RpcError.
    """
    answer = await stub.Describe(engine_pb2.DescribeRequest())
    _check_identity(answer.identity, endpoint)
    digest = answer.card.tokenizer_digest
    if not digest:
        return answer.card, None
    return answer.card, await tokenizers.obtain(digest, partial(_tokenizer_files, stub))


async def _tokenizer_files(stub: engine_pb2_grpc.EngineStub) -> Mapping[str, bytes]:
    full = await stub.Describe(engine_pb2.DescribeRequest(include_tokenizer=True))
    return {file.name: file.content for file in full.tokenizer_files}


def _check_identity(met: engine_pb2.ReplicaIdentity, endpoint: Endpoint) -> None:
    expected = convert.identity_of(endpoint)
    if met != expected:
        raise HandshakeRefused(f"expected {_one_line(expected)}, met {_one_line(met)}")


def _one_line(identity: engine_pb2.ReplicaIdentity) -> str:
    return (
        f"{identity.model}/{identity.slot}#{identity.generation} digest {identity.checkpoint_digest} "
        f"block size {identity.block_size}"
    )
