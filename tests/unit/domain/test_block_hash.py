from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.domain.block_hash import HASH_BYTES, LeadingNames, block_hash, block_hashes, root_hash, short_name


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


TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(TOKENS, st.integers(1, 9), st.binary(max_size=8))
def test_leading_names_are_the_first_bytes_of_all_names(tokens: list[int], block_size: int, salt: bytes) -> None:
    expected = [short_name(name) for name in block_hashes(tokens, block_size, salt)]
    names = LeadingNames(tokens, block_size, salt)
    assert len(names) == len(expected)
    assert [names[i] for i in reversed(range(len(names)))] == expected[::-1], "in any order"
    assert list(names) == expected == list(LeadingNames(tokens, block_size, salt)) == names[:]
    assert names[1:-1] == expected[1:-1]
    with pytest.raises(IndexError):
        names[len(expected)]


def test_a_short_name_is_a_published_value_too() -> None:
    assert list(LeadingNames(range(8), 4, b"tenant")) == [0x9F7827A5D4503FC8, 0xEEF025B47C3CCBBF]


def test_the_block_of_the_last_token_is_never_served_from_the_cache() -> None:
    whole, longer = LeadingNames(range(8), 4), LeadingNames(range(9), 4)
    assert [whole.cached_tokens(held) for held in (0, 1, 2)] == [0, 4, 4]
    assert [longer.cached_tokens(held) for held in (0, 1, 2)] == [0, 4, 8]
    assert LeadingNames([], 4).cached_tokens(0) == 0
