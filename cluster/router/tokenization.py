"""The only door to the `tokenizers` library, and to jinja2 for chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from cluster.domain.errors import CheckpointError, RejectReason, RequestRejected
from cluster.router.detokenizer import Vocabulary

Messages = Sequence[Mapping[str, str]]
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer as `transformers` would use it: no padding, no truncation.

    Built from the files that an engine's Describe returns. CheckpointError when they are damaged.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
            self._config: dict[str, Any] = json.loads(files.get("tokenizer_config.json", b"{}"))
            specials: dict[str, Any] = json.loads(files.get("special_tokens_map.json", b"{}"))
        except KeyError as error:
            raise CheckpointError("The checkpoint has no tokenizer.json; add one, or send token ids.") from error
        except Exception as error:  # boundary: the library raises bare Exception for a damaged file
            raise CheckpointError(f"The checkpoint's tokenizer cannot be read: {error}.") from error
        self._backend.no_padding()
        self._backend.no_truncation()
        template_file = files.get("chat_template.jinja")
        self._chat_template = template_file.decode() if template_file else _configured_template(self._config)
        merged = {**specials, **self._config}
        self._special_tokens = {n: _token_text(merged[n]) for n in _SPECIAL_NAMES if merged.get(n) is not None}
        self._silent: dict[int, bool] = {}
        self._alone: dict[int, str] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; blocks for about a microsecond per character without holding the interpreter."""
        # "Fast" keeps no offsets, which nobody asks for; the ids are the same.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ``token_ids`` without special tokens."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def render_chat(self, messages: Messages) -> str:
        """The prompt of a conversation, ready for the assistant's turn; INVALID when it cannot be rendered."""
        if self._chat_template is None:
            raise RequestRejected(
                RejectReason.INVALID, "This model has no chat template; send the prompt as text or token ids instead."
            )
        try:
            return self._compiled_template.render(
                messages=[dict(m) for m in messages], tools=None, documents=None, add_generation_prompt=True,
                **self._special_tokens,
            )  # fmt: skip
        except Exception as error:  # boundary: a template is foreign code and may raise whatever it likes
            raise RequestRejected(
                RejectReason.INVALID, f"The model's chat template refuses these messages: {error}."
            ) from error

    def prepare(self) -> None:
        """Works out what would otherwise be when it is first asked for; takes a while."""
        self.vocabulary  # noqa: B018
        self.longest_token_characters  # noqa: B018
        if self._chat_template is not None:
            with suppress(Exception):  # boundary: a template is foreign code; whoever sends a chat is told
                self._compiled_template  # noqa: B018

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What incremental detokenization needs."""
        has_fallback = '"ByteFallback"' in json.dumps(json.loads(self._backend.to_str()).get("decoder"))
        found = ((self._backend.token_to_id(f"<0x{b:02X}>"), b) for b in range(256)) if has_fallback else ()
        return Vocabulary(
            decode=self._joined,
            is_silent=self._is_silent,
            byte_values={token_id: byte for token_id, byte in found if token_id is not None},
        )

    @cached_property
    def longest_token_characters(self) -> int:
        """No token stands for more characters of text than this."""
        return max(map(len, self._backend.get_vocab()), default=1)

    @cached_property
    def _special_texts(self) -> frozenset[str]:
        return frozenset(t.content for t in self._backend.get_added_tokens_decoder().values() if t.special)

    @cached_property
    def _compiled_template(self) -> jinja2.Template:
        assert self._chat_template is not None
        return _chat_environment().from_string(self._chat_template)

    def _joined(self, token_ids: Sequence[int]) -> str:
        """As `decode`, special tokens included; what a token is alone is asked for with every one, and kept."""
        if len(token_ids) != 1:
            return self._backend.decode(token_ids, skip_special_tokens=False)
        text = self._alone.get(token_ids[0])
        if text is None:
            text = self._alone[token_ids[0]] = self._backend.decode(token_ids, skip_special_tokens=False)
        return text

    def _is_silent(self, token_id: int) -> bool:
        silent = self._silent.get(token_id)
        if silent is None:
            text = self._backend.id_to_token(token_id)
            silent = self._silent[token_id] = text is None or text in self._special_texts
        return silent


def _token_text(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value)


def _configured_template(config: Mapping[str, Any]) -> str | None:
    """The template of tokenizer_config.json: a string, or a list of named ones of which "default" counts."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


class _GenerationBlocks(jinja2.ext.Extension):
    """Templates may mark the assistant's words with {% generation %}; here that is plain text."""

    tags = {"generation"}  # noqa: RUF012 - the base class's declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _chat_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """As `transformers` sets it up, so that templates written for it render the same."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().astimezone().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates pass it by position too
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
