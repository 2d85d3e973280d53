"""Text from tokens, one at a time, is the text of all tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router.detokenizer import REPLACEMENT, RUN_HELD_TOKENS, WINDOW_TOKENS, Detokenizer
from cluster.router.tokenization import Tokenizer
from tests.contract import small_tokenizers

BACKENDS = {
    "byte_level": small_tokenizers.byte_level(),
    "byte_fallback": small_tokenizers.byte_fallback(),
    "metaspace": small_tokenizers.metaspace(),
}
TOKENIZERS = {name: Tokenizer(small_tokenizers.files(backend)) for name, backend in BACKENDS.items()}
SAMPLES = st.text(alphabet=st.characters(codec="utf-8"), max_size=30) | st.lists(
    st.sampled_from([" ", "▁", "한", "👩‍👩‍👧", "é", "\ufffd", "the", "</s>", "<tool>", "a", "\n"]), max_size=14
).map("".join)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.vocabulary)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
class TestEveryTokenizer:
    @settings(max_examples=120, deadline=None)
    @given(text=SAMPLES)
    def test_text_streams_whole(self, name: str, text: str) -> None:
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode(text)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)

    @settings(max_examples=200, deadline=None)
    @given(ids=st.data())
    def test_any_tokens_stream_whole(self, name: str, ids: st.DataObject) -> None:
        tokenizer = TOKENIZERS[name]
        size = BACKENDS[name].get_vocab_size() + 3  # some that the tokenizer does not know
        longest = RUN_HELD_TOKENS if name == "byte_fallback" else 80
        tokens = ids.draw(st.lists(st.integers(0, size - 1), max_size=longest))
        pieces = stream(tokenizer, tokens)
        whole = tokenizer.decode(tokens)
        assert "".join(pieces) == whole
        emitted = ""
        for piece in pieces:
            emitted += piece
            assert whole.startswith(emitted)

    def test_long_texts_stream_whole(self, name: str) -> None:
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode(" ".join(small_tokenizers.TEXTS * 20))
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_half_a_character_is_never_shown() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a👩b")
    pieces = stream(tokenizer, ids)
    assert len(ids) > 3
    assert "".join(pieces) == "a👩b"
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_an_unfinished_character_comes_out_at_the_end_as_the_library_writes_it() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a👩")[:-1]
    assert stream(tokenizer, ids)[:-1] == ["a", *[""] * (len(ids) - 1)]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_run_of_bytes_that_breaks_is_replaced_byte_by_byte() -> None:
    tokenizer, backend = TOKENIZERS["byte_fallback"], BACKENDS["byte_fallback"]
    ids = [backend.token_to_id(t) for t in ("<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "<0x41>", "▁the")]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == REPLACEMENT * 5 + " the"


def test_a_long_run_of_bytes_is_not_held_back_for_ever() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("한" + "é" * 200)[2:]
    detokenizer = Detokenizer(tokenizer.vocabulary)
    shown = "".join(detokenizer.push(token_id) for token_id in ids)
    assert len(shown) >= 200 - RUN_HELD_TOKENS // 2 - 2
    assert shown + detokenizer.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["👩" * 300, "plain words " * 200, "é" * 300])
def test_the_window_stays_short(text: str) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer.vocabulary)
    for token_id in tokenizer.encode(text):
        detokenizer.push(token_id)
        assert len(detokenizer._window) <= WINDOW_TOKENS + 1


def test_broken_bytes_for_ever_keep_the_window_short() -> None:
    tokenizer, backend = TOKENIZERS["byte_level"], BACKENDS["byte_level"]
    token_id = backend.token_to_id("ÿ")  # byte 0xFF
    detokenizer = Detokenizer(tokenizer.vocabulary)
    text = ""
    for _ in range(200):
        text += detokenizer.push(token_id)
        assert len(detokenizer._window) <= WINDOW_TOKENS + 1
    assert text + detokenizer.flush() == REPLACEMENT * 200
