"""The tokenizer as transformers would use it, chat templates included."""

import asyncio
import json
import threading

import pytest

from cluster.domain.errors import CheckpointError, RejectReason, RequestRejected
from cluster.router.tokenization import INLINE_CHARACTERS, Tokenizer, TokenizerCache
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


async def test_tokenizers_are_built_once_and_long_texts_go_to_a_thread() -> None:
    cache = TokenizerCache()
    tokenizer = await cache.build("d", FILES)
    assert await cache.build("d", {}) is tokenizer is cache.get("d")
    text = "fox " * INLINE_CHARACTERS
    assert await cache.encode(tokenizer, text, add_special_tokens=True) == tokenizer.encode(text)
    cache.close()


async def test_prompts_that_wait_for_a_thread_are_bounded() -> None:
    cache = TokenizerCache(threads=1, pending_max=2)
    tokenizer = await cache.build("d", FILES)
    gate, started, rendered = threading.Event(), threading.Event(), []

    class Slow:
        def render_chat(self, messages: list[str]) -> str:
            started.set()
            assert gate.wait(5)
            rendered.append(messages[0])
            return messages[0]

    running, leaving = (asyncio.create_task(cache.render_chat(Slow(), [name])) for name in ("running", "leaving"))
    await asyncio.to_thread(started.wait, 5)
    with pytest.raises(RequestRejected, match="too many prompts") as caught:
        await cache.encode(tokenizer, "x" * (INLINE_CHARACTERS + 1), add_special_tokens=True)
    assert caught.value.reject_reason is RejectReason.QUEUE_FULL
    assert await cache.encode(tokenizer, "fox", add_special_tokens=True) == tokenizer.encode("fox")
    leaving.cancel()
    await asyncio.wait([leaving])
    with pytest.raises(RequestRejected):  # it still stands in the queue
        await cache.render_chat(Slow(), ["third"])
    gate.set()
    assert await asyncio.wait_for(running, 5) == "running"
    await cache.build("e", FILES)  # the thread has passed by whoever left
    assert await cache.render_chat(Slow(), ["fourth"]) == "fourth"
    assert rendered == ["running", "fourth"]
    cache.close()
