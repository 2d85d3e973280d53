from __future__ import annotations

import hashlib

import pytest

from cluster.domain.block_hash import HASH_BYTES, block_hash, block_hashes, root_hash


def test_the_bytes_are_those_that_the_docs_promise() -> None:
    root = hashlib.sha256(b"llm-cluster/kv-block/1" + b"\x02\0\0\0\0\0\0\0" + b"salt").digest()
    assert root_hash(b"salt", 2) == root
    assert block_hash(root, (1, 258)) == hashlib.sha256(root + b"\x01\0\0\0\x02\x01\0\0").digest()
    assert len(root) == HASH_BYTES


def test_a_published_value_never_changes() -> None:
    """Routers and replicas of two releases may run side by side."""
    first, second = block_hashes(range(8), 4, b"tenant")
    assert first.hex() == "c83f50d4a527789f8d349fce9d9bed037d5fd2c9b328c9a05926aa7acb25eb62"
    assert second.hex() == "bfcb3c7cb425f0ee489a9bb558ea94a24213f1dc22e8037a3653a4b809a89c18"


def test_only_full_blocks_have_a_name_and_a_prefix_has_the_names_of_the_whole() -> None:
    tokens = list(range(100, 113))
    names = block_hashes(tokens, 4)
    assert len(names) == 3
    assert block_hashes(tokens[:11], 4) == names[:2]
    assert block_hashes(tokens[:3], 4) == []


@pytest.mark.parametrize("position", [0, 3, 4, 11])
def test_a_token_changes_its_block_and_all_later_ones(position: int) -> None:
    tokens = list(range(100, 112))
    changed = [*tokens[:position], 7, *tokens[position + 1 :]]
    same = [a == b for a, b in zip(block_hashes(tokens, 4), block_hashes(changed, 4), strict=True)]
    assert same == [block < position // 4 for block in range(3)]


def test_salt_variant_and_block_size_keep_chains_apart() -> None:
    chains = [
        block_hashes(range(8), 4),
        block_hashes(range(8), 4, b"a"),
        block_hashes(range(8), 4, b"b"),
        block_hashes(range(8), 4, b"", 1),
        block_hashes(range(8), 8),
    ]
    names = [name for chain in chains for name in chain]
    assert len(set(names)) == len(names)
