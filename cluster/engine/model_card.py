"""What a replica tells routers about its model: identity, limits, default sampling, the tokenizer's files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.engine.rank_spec import RankSpec
from cluster.v1 import engine_pb2, inference_pb2

# Everything a router needs to build the tokenizer and the chat template; nothing else leaves a replica.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def default_sampling(generation_config: Mapping[str, Any]) -> inference_pb2.Sampling:
    """generation_config.json in the words of the API; greedy when it does not sample, penalties in either case."""
    message, names = inference_pb2.Sampling(), ["repetition_penalty"]
    if generation_config.get("do_sample", False):
        message.temperature = generation_config.get("temperature") or 1.0
        names += ["top_p", "top_k", "min_p"]
    for name in names:
        value = generation_config.get(name)
        if value is not None:
            setattr(message, name, value)
    return message


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files by name; empty when the checkpoint carries no tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        return {}
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """sha256 over names and contents; empty without files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + len(files[name]).to_bytes(8, "little") + files[name])
    return digest.hexdigest() if files else ""


def identity(spec: RankSpec) -> engine_pb2.ReplicaIdentity:
    """Who this replica is, for the handshake."""
    incarnation = spec.rank_id.incarnation
    return engine_pb2.ReplicaIdentity(
        model=incarnation.replica.model,
        slot=incarnation.replica.slot,
        generation=incarnation.generation,
        checkpoint_digest=spec.served_digest,
        block_size=spec.block_size,
    )


def model_card(
    spec: RankSpec, vocab_size: int, end_token_ids: tuple[int, ...], generation_config: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> engine_pb2.ModelCard:  # fmt: skip
    """The card that Describe answers with."""
    return engine_pb2.ModelCard(
        name=spec.rank_id.incarnation.replica.model,
        max_model_len=spec.max_model_len,
        vocab_size=vocab_size,
        checkpoint_digest=spec.served_digest,
        tokenizer_digest=tokenizer_digest(files),
        end_token_ids=end_token_ids,
        default_sampling=default_sampling(generation_config),
        max_num_seqs=spec.max_num_seqs,
    )
