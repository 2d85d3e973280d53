"""The tokenizer as transformers would use it, chat templates included."""

import json

import pytest

from cluster.domain.errors import CheckpointError, RejectReason, RequestRejected
from cluster.router.tokenization import Tokenizer
from tests.contract import small_tokenizers

FILES = small_tokenizers.files(small_tokenizers.byte_level())
MESSAGES = [{"role": "user", "content": "fox?"}]


def with_config(**config: object) -> Tokenizer:
    return Tokenizer({"tokenizer.json": FILES["tokenizer.json"], "tokenizer_config.json": json.dumps(config).encode()})


def test_special_tokens_are_left_out_of_text() -> None:
    tokenizer = Tokenizer(FILES)
    ids = tokenizer.encode("<s>fox</s>")
    assert tokenizer.decode(ids) == "fox"
    assert ids[0] == small_tokenizers.byte_level().token_to_id("<s>")


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    backend = small_tokenizers.byte_level().__class__.from_str(FILES["tokenizer.json"].decode())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer({"tokenizer.json": backend.to_str().encode()})
    assert tokenizer.decode(tokenizer.encode("The quick fox")) == "The quick fox"


def test_a_chat_is_rendered_with_the_special_tokens() -> None:
    assert Tokenizer(FILES).render_chat(MESSAGES) == "<s><|user|>fox?</s>\n<|assistant|>"


def test_the_template_file_comes_before_the_config() -> None:
    files = {**FILES, "chat_template.jinja": b"{{ messages[0].content | tojson }}{{ eos_token }}"}
    assert Tokenizer(files).render_chat([{"role": "user", "content": 'ä<"'}]) == '"ä<\\""</s>'


def test_named_templates_and_generation_blocks() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    tokenizer = with_config(
        chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    )
    assert tokenizer.render_chat(MESSAGES * 2) == "fox?"


@pytest.mark.parametrize(
    ("tokenizer", "role", "names"),
    [
        (with_config(), "user", "no chat template"),
        (Tokenizer(FILES), "tool", "no tools here"),
        (with_config(chat_template="{% for %}"), "user", "chat template"),
        (with_config(chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}"), "user", "chat template"),
        (with_config(chat_template="{{ 1 // 0 }}"), "user", "chat template"),
    ],
)
def test_what_cannot_be_rendered_is_the_requests_fault(tokenizer: Tokenizer, role: str, names: str) -> None:
    with pytest.raises(RequestRejected, match=names) as caught:
        tokenizer.render_chat([{"role": role, "content": "x"}])
    assert caught.value.reject_reason is RejectReason.INVALID


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": b"{"}, {**FILES, "tokenizer_config.json": b"["}])
def test_damaged_files(files: dict[str, bytes]) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        Tokenizer(files)
