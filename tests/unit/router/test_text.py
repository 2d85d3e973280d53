"""Stop strings, the text stream and the journal."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.journal import Journal
from cluster.router.stop_strings import StopFilter
from cluster.router.text import TextStream
from cluster.router.tokenization import Tokenizer
from tests.contract import small_tokenizers

TOKENIZER = Tokenizer(small_tokenizers.files(small_tokenizers.byte_level()))
LETTERS = st.text(alphabet="ab", max_size=12)


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    stop_filter, out = StopFilter(stops), ""
    for piece in pieces:
        out += stop_filter.push(piece)
        if stop_filter.stopped:
            return out, True
    return out + stop_filter.flush(), False


@given(st.lists(LETTERS.filter(bool), min_size=1, max_size=3), st.lists(LETTERS, max_size=8))
def test_text_is_cut_before_the_first_stop_wherever_it_is_split(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    out, stopped = run(stops, pieces)
    found = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(found)
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if not found:
        assert out == text


@given(st.lists(LETTERS.filter(bool), min_size=1, max_size=3), LETTERS)
def test_no_more_is_held_back_than_may_become_a_stop(stops: list[str], text: str) -> None:
    stop_filter = StopFilter(stops)
    out = stop_filter.push(text)
    if not stop_filter.stopped:
        held = text[len(out) :]
        assert len(held) < max(map(len, stops))
        assert not held or any(stop.startswith(held) for stop in stops)


def test_without_stops_nothing_is_held() -> None:
    assert run([], ["a", "b"]) == ("ab", False)


def test_a_text_stream_keeps_the_token_that_completes_the_stop_and_no_later_one() -> None:
    ids = TOKENIZER.encode("fox STOP dog")
    stream = TextStream(TOKENIZER.vocabulary, ["STOP"])
    emission = stream.push(ids)
    assert emission.text == "fox "
    assert stream.stopped
    assert TOKENIZER.decode(ids[: emission.kept]).rstrip().endswith("STOP")
    assert stream.flush() == ""


@given(st.integers(0, 30), st.integers(0, 30))
def test_a_text_stream_says_the_same_however_its_tokens_are_dealt(first: int, second: int) -> None:
    ids = TOKENIZER.encode("The fox 👩 says: STO. STOP or ST")
    whole, split = (TextStream(TOKENIZER.vocabulary, ["STOP or S", "zz"]) for _ in range(2))
    expected = whole.push(ids)
    text, kept = "", 0
    cuts = sorted({0, min(first, len(ids)), min(second, len(ids)), len(ids)})
    for start, end in itertools.pairwise(cuts):
        if not split.stopped:
            emission = split.push(ids[start:end])
            text, kept = text + emission.text, kept + emission.kept
    assert (text, kept) == (expected.text, expected.kept)


def test_stops_do_not_count_before_min_tokens() -> None:
    ids = TOKENIZER.encode("STOP fox STOP")
    early = TextStream(TOKENIZER.vocabulary, ["STOP"])
    late = TextStream(TOKENIZER.vocabulary, ["STOP"], min_tokens=len(TOKENIZER.encode("STOP")) + 1)
    assert early.push(ids).text == ""
    assert late.push(ids).text == "STOP fox "


@pytest.mark.parametrize("min_tokens", range(9))
@pytest.mark.parametrize("at_once", [True, False])
def test_a_stop_that_ends_after_min_tokens_counts_wherever_it_begins(min_tokens: int, *, at_once: bool) -> None:
    ids = [TOKENIZER.encode(character)[0] for character in "abSTOPcd"]
    stream = TextStream(TOKENIZER.vocabulary, ["STOP", "STOPPED", "PS"], min_tokens)
    text = ""
    for some in [ids] if at_once else [[token] for token in ids]:
        if not stream.stopped:
            text += stream.push(some).text
    if not stream.stopped:
        text += stream.flush()
    assert stream.stopped == (min_tokens <= len("abSTOP"))
    assert text == ("ab" if stream.stopped else "abSTOPcd")


def test_a_stop_in_the_held_back_end_is_found_by_flush() -> None:
    stream = TextStream(TOKENIZER.vocabulary, ["\ufffd"])
    ids = TOKENIZER.encode("a👩")[:-1]
    assert stream.push(ids).text == "a"
    assert stream.flush() == ""
    assert stream.stopped


def test_the_journal_counts_this_calls_tokens_and_one_attempt() -> None:
    journal = Journal([1, 2], max_tokens=5)
    assert journal.begin_attempt() == 1
    journal.append([3])
    assert journal.begin_attempt() == 2
    assert (list(journal.generated), journal.generated_tokens, journal.room) == ([1, 2, 3], 1, 2)
    journal.append([4, 5])
    assert journal.full
    with pytest.raises(AssertionError):
        journal.append([6])
