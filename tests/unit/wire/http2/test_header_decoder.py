from __future__ import annotations

from hpack import Decoder, Encoder, HeaderTuple, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from cluster.wire.http2.header_decoder import KEPT_BLOCKS, KeepingDecoder

NAMES = [b":path", b"te", b"x-a", b"x-b"]
FIELD = st.builds(
    lambda kind, name, value: kind(name, value),
    st.sampled_from([HeaderTuple, NeverIndexedHeaderTuple]),
    st.sampled_from(NAMES),
    st.sampled_from([b"trailers", b"1", b"v" * 50]),
)
BLOCKS = st.lists(st.lists(FIELD, min_size=1, max_size=4), max_size=30)


@given(blocks=BLOCKS, sizes=st.lists(st.sampled_from([0, 60, 150, 4096]), max_size=30))
def test_it_says_what_the_plain_one_says(blocks: list[list[HeaderTuple]], sizes: list[int]) -> None:
    encoder, plain, keeping = Encoder(), Decoder(), KeepingDecoder()
    for index, block in enumerate(blocks):
        if index < len(sizes):
            encoder.header_table_size = sizes[index]  # fields leave, and come again under other numbers
        encoded = encoder.encode(block)
        assert list(keeping.decode(encoded, raw=True)) == list(plain.decode(encoded, raw=True)) == block
        assert list(keeping.header_table.dynamic_entries) == list(plain.header_table.dynamic_entries)


def test_a_block_of_known_fields_is_read_once() -> None:
    encoder, keeping = Encoder(), KeepingDecoder()
    call = [HeaderTuple(b":path", b"/a.B/C"), HeaderTuple(b"te", b"trailers")]
    first, second = (encoder.encode(call) for _ in range(2))
    assert first != second, "by then they have numbers"
    keeping.decode(first, raw=True)
    assert keeping.decode(second, raw=True) is keeping.decode(second, raw=True)


def test_what_is_kept_is_bounded() -> None:
    keeping = KeepingDecoder()
    for first in range(1, 62):
        for second in (2, 3, 4, 5):
            keeping.decode(bytes((0x80 + first, 0x80 + second)), raw=True)
    assert len(keeping._kept) == KEPT_BLOCKS
