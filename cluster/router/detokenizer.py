"""Tokens to text, one at a time: the text so far is a pure function of the tokens so far.

For every prefix of the tokens, what has been emitted is a prefix of ``decode(all tokens)``, never ends in half
a character, and after ``flush`` equals it. Each token costs one decode of a few tokens: a window that starts
one clean boundary before the text in question, because decoders treat the first token of a text specially
(a leading space is stripped).

Two kinds of tokens do not end at a character:

- byte-level BPE: an unfinished character decodes to one trailing U+FFFD, which is held back;
- byte fallback (``<0xE4>``): a run of byte tokens is decoded as a whole, and when it is not UTF-8 *every* byte of
  it becomes U+FFFD. A run is therefore held until it ends or is known to be broken, for at most
  ``RUN_HELD_TOKENS`` tokens; a longer one is let out as far as it is valid.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

REPLACEMENT = "\ufffd"
RUN_HELD_TOKENS = 32
WINDOW_TOKENS = 24
WINDOW_CUT_TOKENS = 8
CONTEXT_TOKENS = 4  # a character has at most four bytes, so at most four tokens share it


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What detokenizing needs of a tokenizer.

    ``decode`` joins tokens to text and skips nothing; ``is_silent`` names tokens that have no text (special, or
    unknown to the tokenizer); ``byte_values`` maps byte-fallback tokens to their byte, empty without fallback.
    """

    decode: Callable[[Sequence[int]], str]
    is_silent: Callable[[int], bool]
    byte_values: Mapping[int, int]


class Detokenizer:
    """The state of one text; see the module's contract."""

    __slots__ = ("_all_out", "_broken", "_bytes", "_emitted", "_run", "_vocabulary", "_window")

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []  # context, then tokens whose text is not out yet
        self._emitted = 0  # characters of the window's text that are out
        self._all_out = True  # they are all of them
        self._run: list[int] = []  # byte-fallback tokens held back
        self._bytes: codecs.IncrementalDecoder | None = None
        self._broken = False  # the run at the end of the window is not UTF-8

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` lets out."""
        vocabulary = self._vocabulary
        if vocabulary.is_silent(token_id):
            return ""
        if vocabulary.byte_values:
            byte = vocabulary.byte_values.get(token_id)
            if byte is not None:
                return self._push_byte(token_id, byte)
            if self._run:
                self._window += self._run
                self._run = []
            self._bytes, self._broken = None, False
        self._window.append(token_id)
        return self._let_out(hold_partial=True)

    def flush(self) -> str:
        """The rest, when nothing more will come."""
        if self._all_out and not self._run:
            return ""
        self._window += self._run
        self._run, self._bytes, self._broken = [], None, False
        return self._let_out(hold_partial=False)

    def _push_byte(self, token_id: int, byte: int) -> str:
        if self._broken:
            return REPLACEMENT
        if self._bytes is None:
            self._bytes = codecs.getincrementaldecoder("utf-8")()
        self._run.append(token_id)
        try:
            self._bytes.decode(bytes((byte,)))
        except UnicodeDecodeError:
            return self._break_run()
        unfinished = len(self._bytes.getstate()[0])
        if len(self._run) <= RUN_HELD_TOKENS or unfinished:
            return ""
        self._window += self._run
        self._run = []
        return self._let_out(hold_partial=False)

    def _break_run(self) -> str:
        """The run is no UTF-8 and never will be: all its bytes are U+FFFD, and so are those that follow it."""
        self._window += self._run
        text = self._let_out(hold_partial=False)
        # One byte of the run stays as context, so that what follows is not taken for the beginning of a text.
        self._window = [self._run[-1]]
        self._emitted = len(self._vocabulary.decode(self._window))
        self._run, self._bytes, self._broken = [], None, True
        return text

    def _let_out(self, *, hold_partial: bool) -> str:
        text = self._vocabulary.decode(self._window)
        end = len(text)
        if hold_partial and text.endswith(REPLACEMENT):
            end -= 1
        new = text[self._emitted : end]
        self._all_out = end == len(text)
        if self._all_out:
            self._restart_after(text)
        else:
            self._emitted = max(self._emitted, end)
            self._shorten(text, end)
        return new

    def _restart_after(self, text: str) -> None:
        """All is out: the fewest last tokens that stand alone are context enough."""
        for size in range(1, CONTEXT_TOKENS + 1):
            context = self._window[-size:]
            alone = self._vocabulary.decode(context)
            if alone and REPLACEMENT not in alone:
                self._window, self._emitted = context, len(alone)
                return
        self._emitted = len(text)
        self._shorten(text, len(text))

    def _shorten(self, text: str, end: int) -> None:
        """Drops the front of a window that grows too long, where no character spans the cut."""
        if len(self._window) <= WINDOW_TOKENS:
            return
        decode = self._vocabulary.decode
        for cut in range(len(self._window) - WINDOW_CUT_TOKENS, 1, -1):
            # The token before the cut stays as context; both its sides must fall on a boundary.
            context = decode(self._window[cut - 1 : cut])
            tail = decode(self._window[cut - 1 :])
            head = decode(self._window[: cut - 1])
            if context and len(head) <= end and head + tail == text:
                self._window = self._window[cut - 1 :]
                self._emitted = end - len(head)
                return
