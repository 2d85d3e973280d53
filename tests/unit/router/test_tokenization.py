"""The tokenizer as transformers would use it, chat templates included."""

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping, Sequence

import pytest

from cluster.domain.errors import CheckpointError, RejectReason, RequestRejected
from cluster.router.tokenization import (
    INLINE_CHARACTERS,
    INLINE_MESSAGES,
    LONG_CHARACTERS,
    WAITING_CHARACTERS_LEAST,
    Tokenizer,
    TokenizerCache,
)
from tests.contract import small_tokenizers

FILES = small_tokenizers.files(small_tokenizers.byte_level())
MESSAGES = [{"role": "user", "content": "fox?"}]
LONG = "x" * (INLINE_CHARACTERS + 1)


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


@pytest.fixture
def cache() -> Iterator[TokenizerCache]:
    """With one thread, for which two may wait."""
    made = TokenizerCache(threads=1, waiting_max=2 * WAITING_CHARACTERS_LEAST)
    yield made
    made.close()


class Slow:
    """A tokenizer that notes what it renders; "slow" takes until ``go_on`` is set."""

    def __init__(self) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        self.rendered: list[str] = []
        self.threads: set[int] = set()

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        name = messages[0]["role"]
        self.rendered.append(name)
        self.threads.add(threading.get_ident())
        if name == "slow":
            self.started.set()
            assert self.go_on.wait(5)
        return name

    def encode(self, text: str, **_: bool) -> list[int]:
        return [len(text)]

    async def encoded(self, cache: TokenizerCache, name: str, tenant: str = "", content: str = LONG) -> list[int]:
        return await cache.encode_chat(self, [{"role": name, "content": content}], lambda _: None, tenant=tenant)

    def task(self, cache: TokenizerCache, name: str, tenant: str = "", content: str = LONG) -> asyncio.Task[list[int]]:
        return asyncio.create_task(self.encoded(cache, name, tenant, content))

    async def occupied(self, cache: TokenizerCache) -> asyncio.Task[list[int]]:
        """The cache's thread works until ``go_on``."""
        task = self.task(cache, "slow")
        await asyncio.to_thread(self.started.wait, 5)
        return task


async def test_prompts_that_wait_for_a_thread_are_bounded(cache: TokenizerCache) -> None:
    tokenizer, slow = await cache.build("d", FILES), Slow()
    running = await slow.occupied(cache)
    waiting = [slow.task(cache, name) for name in ("leaving", "staying")]
    await asyncio.sleep(0)
    with pytest.raises(RequestRejected, match="too many prompts") as caught:
        await cache.encode(tokenizer, LONG, add_special_tokens=True)
    assert caught.value.reject_reason is RejectReason.QUEUE_FULL
    assert await cache.encode(tokenizer, "fox", add_special_tokens=True) == tokenizer.encode("fox")
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    waiting.append(slow.task(cache, "after whoever left"))
    await asyncio.sleep(0)
    slow.go_on.set()
    assert await asyncio.wait_for(asyncio.gather(running, *waiting[1:]), 5) == [[4], [7], [18]]
    assert slow.rendered == ["slow", "staying", "after whoever left"]


async def test_tenants_take_turns_and_the_one_with_the_most_makes_room(cache: TokenizerCache) -> None:
    slow = Slow()
    running = await slow.occupied(cache)
    heavy = [slow.task(cache, name, "heavy") for name in ("first", "second")]
    await asyncio.sleep(0)
    light = slow.task(cache, "light", "light")
    with pytest.raises(RequestRejected, match="too many prompts"):
        await asyncio.wait_for(heavy[1], 5)
    with pytest.raises(RequestRejected):
        await slow.encoded(cache, "third", "heavy")
    slow.go_on.set()
    await asyncio.wait_for(asyncio.gather(running, heavy[0], light), 5)
    assert slow.rendered == ["slow", "first", "light"]


async def test_characters_that_wait_are_bounded(cache: TokenizerCache) -> None:
    slow, most = Slow(), "x" * (2 * WAITING_CHARACTERS_LEAST)
    running = await slow.occupied(cache)
    large = slow.task(cache, "large", "heavy", most + most)  # alone it may wait, however large
    await asyncio.sleep(0)
    with pytest.raises(RequestRejected, match="too many prompts"):
        await slow.encoded(cache, "another", "heavy")
    small = slow.task(cache, "small", "light")
    with pytest.raises(RequestRejected, match="too many prompts"):
        await asyncio.wait_for(large, 5)
    slow.go_on.set()
    assert await asyncio.wait_for(asyncio.gather(running, small), 5) == [[4], [5]]


async def test_very_long_prompts_leave_a_thread_to_the_others() -> None:
    cache, slow, very_long = TokenizerCache(threads=2), Slow(), "x" * (LONG_CHARACTERS + 1)
    running = slow.task(cache, "slow", "heavy", very_long)
    following = slow.task(cache, "following", "heavy", very_long)
    await asyncio.to_thread(slow.started.wait, 5)
    ordinary = [slow.task(cache, name, tenant) for name, tenant in (("first", "light"), ("second", "lighter"))]
    assert await asyncio.wait_for(asyncio.gather(*ordinary), 5) == [[5], [6]]
    assert slow.rendered == ["slow", "first", "second"]
    slow.go_on.set()
    assert await asyncio.wait_for(asyncio.gather(running, following), 5) == [[4], [9]]
    cache.close()


async def test_who_leaves_while_a_thread_works_holds_the_thread_and_nobody_else(cache: TokenizerCache) -> None:
    slow = Slow()
    running = await slow.occupied(cache)
    running.cancel()
    await asyncio.wait([running])
    following = slow.task(cache, "following")
    await asyncio.sleep(0)
    assert slow.rendered == ["slow"]
    slow.go_on.set()
    assert await asyncio.wait_for(following, 5) == [9]


async def test_those_that_wait_are_told_when_the_threads_end(cache: TokenizerCache) -> None:
    slow = Slow()
    running = await slow.occupied(cache)
    waiting = slow.task(cache, "waiting")
    await asyncio.sleep(0)
    cache.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    slow.go_on.set()
    assert await asyncio.wait_for(running, 5) == [4]


async def test_short_chats_need_no_thread(cache: TokenizerCache) -> None:
    slow = Slow()
    running = await slow.occupied(cache)
    slow.threads.clear()
    assert await slow.encoded(cache, "here", content="x" * (INLINE_CHARACTERS - 4)) == [4]
    assert slow.threads == {threading.get_ident()}
    long_ones = [
        asyncio.create_task(cache.encode_chat(slow, messages, lambda _: None))
        for messages in ([{"role": "long", "content": LONG}], [{"role": "many", "content": ""}] * (INLINE_MESSAGES + 1))
    ]
    await asyncio.sleep(0)
    assert slow.rendered == ["slow", "here"]
    slow.go_on.set()
    await asyncio.wait_for(asyncio.gather(running, *long_ones), 5)
    assert slow.rendered[2:] == ["long", "many"]


@pytest.mark.parametrize("content", ["short", LONG])
async def test_a_rendered_chat_may_be_refused_before_it_is_tokenized(cache: TokenizerCache, content: str) -> None:
    class Rendering:
        render_chat = staticmethod(lambda messages: messages[0]["content"] + "!")
        encode = staticmethod(lambda *_, **__: pytest.fail("it was tokenized"))

    def refuse(prompt: str) -> None:
        assert prompt == content + "!"
        raise RequestRejected(RejectReason.INVALID, "no")

    with pytest.raises(RequestRejected, match="no"):
        await cache.encode_chat(Rendering(), [{"role": "user", "content": content}], refuse)


async def test_a_template_that_cannot_be_compiled_does_not_keep_its_model_away(cache: TokenizerCache) -> None:
    files = {**FILES, "chat_template.jinja": b"{% for %}"}
    tokenizer = await cache.build("d", files)
    with pytest.raises(RequestRejected, match="chat template"):
        await cache.encode_chat(tokenizer, MESSAGES, lambda _: None)
