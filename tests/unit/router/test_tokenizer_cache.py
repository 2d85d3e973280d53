"""Whose prompt gets a thread when, what is refused, and one tokenizer for all who share it."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import pytest

from cluster.domain.clock import ManualClock
from cluster.domain.errors import CheckpointError, RejectReason, RequestEvicted, RequestRejected
from cluster.router import tokenizer_cache
from cluster.router.prompt_turns import SURE_AFTER
from cluster.router.tokenization import Tokenizer
from cluster.router.tokenizer_cache import (
    INLINE_CHARACTERS,
    INLINE_MESSAGES,
    LONG_CHARACTERS,
    MESSAGE_BYTES,
    MESSAGE_CHARACTERS,
    WAITING_CHARACTERS_LEAST,
    TokenizerCache,
)
from cluster.v1 import inference_pb2
from cluster.wire.status import from_rpc_error
from tests.contract import small_tokenizers
from tests.contract.fake_engine import FakeEngine, hashed_token
from tests.contract.router_cluster import RouterCluster, eventually

FILES = small_tokenizers.files(small_tokenizers.byte_level())
LONG = "x" * (INLINE_CHARACTERS + 1)


async def test_tokenizers_are_built_once_and_long_texts_go_to_a_thread() -> None:
    cache = TokenizerCache()
    tokenizer = await cache.build("d", FILES)
    assert await cache.build("d", {}) is tokenizer
    text = "fox " * INLINE_CHARACTERS
    assert await cache.encode(tokenizer, text, add_special_tokens=True) == tokenizer.encode(text)
    cache.close()


@pytest.fixture
def cache() -> Iterator[TokenizerCache]:
    """With one thread, for which two may wait."""
    made = TokenizerCache(threads=1, waiting_max=2 * WAITING_CHARACTERS_LEAST)
    yield made
    made.close()


def said(role: str, content: str) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(role=role, content=content)


class Slow:
    """A tokenizer that notes what it renders; "slow" takes until ``go_on`` is set, and ``pace`` characters a second."""

    def __init__(self, clock: ManualClock | None = None, pace: float = 1e5) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        self.rendered: list[str] = []
        self.threads: set[int] = set()
        self._clock, self._pace = clock, pace

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        name = messages[0]["role"]
        self.rendered.append(name)
        self.threads.add(threading.get_ident())
        if name == "slow":
            self.started.set()
            assert self.go_on.wait(5)
        if self._clock is not None:
            self._clock.advance(work_of(name, messages[0]["content"]) / self._pace)
        return name

    def encode(self, text: str, **_: bool) -> list[int]:
        return [len(text)]

    async def encoded(
        self, cache: TokenizerCache, name: str, tenant: str = "", content: str = LONG, **turn: Any
    ) -> list[int]:
        return await cache.encode_chat(self, [said(name, content)], lambda _: None, tenant=tenant, **turn)

    def task(
        self, cache: TokenizerCache, name: str, tenant: str = "", content: str = LONG, **turn: Any
    ) -> asyncio.Task[list[int]]:
        return asyncio.create_task(self.encoded(cache, name, tenant, content, **turn))

    async def occupied(self, cache: TokenizerCache, content: str = LONG) -> asyncio.Task[list[int]]:
        """The cache's thread works until ``go_on``."""
        task = self.task(cache, "slow", content=content)
        await asyncio.to_thread(self.started.wait, 5)
        return task


def work_of(role: str, content: str) -> int:
    """What a chat of one message costs a thread."""
    return len(role) + len(content) + MESSAGE_CHARACTERS


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


@pytest.mark.parametrize("tenants", [("light", "lighter"), ("heavy", "heavy")])
async def test_very_long_prompts_leave_a_thread_to_the_others(tenants: tuple[str, str]) -> None:
    cache, slow, very_long = TokenizerCache(threads=2), Slow(), "x" * (LONG_CHARACTERS + 1)
    running = slow.task(cache, "slow", "heavy", very_long)
    following = slow.task(cache, "following", "heavy", very_long)
    await asyncio.to_thread(slow.started.wait, 5)
    ordinary = [slow.task(cache, name, tenant) for name, tenant in zip(("first", "second"), tenants, strict=True)]
    assert await asyncio.wait_for(asyncio.gather(*ordinary), 5) == [[5], [6]]
    assert slow.rendered == ["slow", "first", "second"]
    slow.go_on.set()
    assert await asyncio.wait_for(asyncio.gather(running, following), 5) == [[4], [9]]
    cache.close()


async def test_higher_priorities_go_first_and_lower_ones_make_room(cache: TokenizerCache) -> None:
    tokenizer, slow = await cache.build("d", FILES), Slow()
    running = await slow.occupied(cache)
    batch = [slow.task(cache, name, priority=-1) for name in ("batch", "later batch")]
    await asyncio.sleep(0)
    usual = slow.task(cache, "usual")
    with pytest.raises(RequestRejected, match="too many prompts"):
        await asyncio.wait_for(batch[1], 5)
    urgent = asyncio.create_task(cache.encode(tokenizer, LONG, add_special_tokens=True, priority=1))
    with pytest.raises(RequestRejected, match="too many prompts"):
        await asyncio.wait_for(batch[0], 5)
    more_urgent = slow.task(cache, "more urgent", priority=2)
    with pytest.raises(RequestRejected, match="too many prompts"):
        await asyncio.wait_for(usual, 5)
    with pytest.raises(RequestRejected, match="too many prompts"):
        await slow.encoded(cache, "another batch", priority=-1)
    urgent.add_done_callback(lambda _: slow.rendered.append("urgent"))
    slow.go_on.set()
    await asyncio.wait_for(asyncio.gather(running, urgent, more_urgent), 5)
    assert slow.rendered == ["slow", "more urgent", "urgent"]


async def test_messages_count_for_what_they_hold_beside_their_characters(cache: TokenizerCache) -> None:
    slow, many = Slow(), 2 * WAITING_CHARACTERS_LEAST // MESSAGE_BYTES
    running = await slow.occupied(cache)
    first = asyncio.create_task(cache.encode_chat(slow, [said("tiny", "x")] * many, lambda _: None))
    await asyncio.sleep(0)
    with pytest.raises(RequestRejected, match="too many prompts"):
        await slow.encoded(cache, "another")
    first.cancel()
    await asyncio.wait([first])
    fewer = asyncio.create_task(cache.encode_chat(slow, [said("fewer", "")] * (many // 2 - 4), lambda _: None))
    another = slow.task(cache, "another")
    slow.go_on.set()
    await asyncio.wait_for(asyncio.gather(running, fewer, another), 5)


class Noting(list[inference_pb2.ChatMessage]):
    """Messages that note which threads look at them."""

    def __init__(self, *messages: inference_pb2.ChatMessage) -> None:
        super().__init__(messages)
        self.threads: list[int] = []

    def __iter__(self) -> Iterator[inference_pb2.ChatMessage]:
        self.threads.append(threading.get_ident())
        return super().__iter__()


async def test_messages_wait_as_they_are_until_a_thread_has_time(cache: TokenizerCache) -> None:
    slow, messages = Slow(), Noting(said("chat", LONG))
    running = await slow.occupied(cache)
    waiting = asyncio.create_task(cache.encode_chat(slow, messages, lambda _: None))
    await asyncio.sleep(0)
    assert messages.threads == [threading.get_ident()]  # counted
    slow.go_on.set()
    await asyncio.wait_for(asyncio.gather(running, waiting), 5)
    assert len(messages.threads) == 2
    assert messages.threads[1] != threading.get_ident()


class TestDeadlines:
    """The pace is known, 100,000 characters per second, and a prompt of 100,000 keeps a thread."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    async def known(self, cache: TokenizerCache, slow: Slow) -> None:
        for _ in range(SURE_AFTER):
            await slow.encoded(cache, "known", left_s=60.0)
        slow.rendered.clear()

    def content(self, seconds: float, role: str = "slow") -> str:
        return "x" * (round(seconds * 1e5) - MESSAGE_CHARACTERS - len(role))

    async def test_who_would_be_too_late_is_refused_at_once(self, clock: ManualClock) -> None:
        cache, slow = TokenizerCache(threads=1, clock=clock), Slow(clock)
        await self.known(cache, slow)
        running = await slow.occupied(cache, self.content(10))
        ahead = slow.task(cache, "ahead", content=self.content(4, "ahead"))
        batch = slow.task(cache, "batch", content=self.content(5, "batch"), priority=-1)
        await asyncio.sleep(0)
        clock.advance(2.0)  # 8 and 4 seconds of work are before another one of 2
        own = self.content(2, "x")
        with pytest.raises(RequestEvicted, match=r"about 14\.0 s.*more time"):
            await slow.encoded(cache, "x", content=own, left_s=6.9)
        with pytest.raises(RequestEvicted, match=r"about 10\.0 s"):
            await slow.encoded(cache, "x", content=own, priority=1, left_s=4.9)
        with pytest.raises(RequestEvicted, match=r"about 19\.0 s"):
            await slow.encoded(cache, "x", content=own, priority=-1, left_s=9.4)
        in_time = [
            slow.task(cache, "y", content=own, left_s=7.1),
            slow.task(cache, "z", content=own, priority=1, left_s=5.1),
            slow.task(cache, "w", content=own, priority=-1),
        ]
        await asyncio.sleep(0)
        for task in in_time:
            assert not task.done()
            task.cancel()
        slow.go_on.set()
        await asyncio.wait_for(asyncio.gather(running, ahead, batch), 5)
        assert slow.rendered == ["slow", "ahead", "batch"]
        cache.close()

    async def test_nobody_is_refused_before_the_pace_is_known(self, clock: ManualClock) -> None:
        cache, slow = TokenizerCache(threads=1, clock=clock), Slow(clock)
        for _ in range(SURE_AFTER):
            assert await slow.encoded(cache, "x", content=self.content(10), left_s=1.0)
        with pytest.raises(RequestEvicted):
            await slow.encoded(cache, "x", content=self.content(10), left_s=1.0)
        cache.close()

    async def test_a_text_has_a_deadline_too(self, clock: ManualClock) -> None:
        cache, slow = TokenizerCache(threads=1, clock=clock), Slow(clock)
        await self.known(cache, slow)
        with pytest.raises(RequestEvicted):
            await cache.encode(slow, self.content(10), add_special_tokens=True, left_s=1.0)
        cache.close()

    async def test_another_tenants_line_is_not_ahead(self, clock: ManualClock) -> None:
        cache, slow = TokenizerCache(threads=1, clock=clock), Slow(clock)
        await self.known(cache, slow)
        running = await slow.occupied(cache, self.content(1))
        heavy = [slow.task(cache, "heavy", "heavy", self.content(1)) for _ in range(20)]
        await asyncio.sleep(0)
        with pytest.raises(RequestEvicted):
            await slow.encoded(cache, "x", "heavy", left_s=3.0)
        light = slow.task(cache, "light", "light", left_s=3.0)
        await asyncio.sleep(0)
        slow.go_on.set()
        await asyncio.wait_for(asyncio.gather(running, light, *heavy), 5)
        assert slow.rendered[:3] == ["slow", "heavy", "light"]
        cache.close()

    async def test_very_long_ones_are_not_before_the_others(self, clock: ManualClock) -> None:
        cache, slow = TokenizerCache(threads=2, clock=clock), Slow(clock)
        await self.known(cache, slow)
        running = await slow.occupied(cache, self.content(20))
        very_long = [slow.task(cache, "very long", content=self.content(20)) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(RequestEvicted):
            await slow.encoded(cache, "x", content=self.content(20), left_s=10.0)
        assert await slow.encoded(cache, "first", content=self.content(1), left_s=1.0) == [5]
        slow.go_on.set()
        await asyncio.wait_for(asyncio.gather(running, *very_long), 5)
        cache.close()

    async def test_the_thread_that_very_long_ones_have_is_theirs(self, clock: ManualClock) -> None:
        cache, slow = TokenizerCache(threads=2, clock=clock), Slow(clock)
        await self.known(cache, slow)
        running = [await slow.occupied(cache, self.content(20))]
        clock.advance(19.0)
        slow.started.clear()
        running += [await slow.occupied(cache, self.content(4)), slow.task(cache, "next", content=self.content(20))]
        await asyncio.sleep(0)
        with pytest.raises(RequestEvicted, match=r"about 5\.0 s"):
            await slow.encoded(cache, "x", content=self.content(1, "x"), left_s=2.4)
        slow.go_on.set()
        await asyncio.wait_for(asyncio.gather(*running), 5)
        cache.close()

    async def test_no_thread_is_kept_busy_for_who_will_be_gone(self, clock: ManualClock) -> None:
        cache, slow = TokenizerCache(threads=1, clock=clock), Slow(clock)
        await self.known(cache, slow)
        running = await slow.occupied(cache, self.content(1))
        late, after = slow.task(cache, "late", content=self.content(4), left_s=5.0), slow.task(cache, "after")
        await asyncio.sleep(0)
        clock.advance(3.0)  # while that one ran, which takes one second more
        slow.go_on.set()
        await asyncio.wait_for(asyncio.gather(running, after), 5)
        with pytest.raises(RequestEvicted, match="more time"):
            await late
        assert slow.rendered == ["slow", "after"]
        cache.close()

    async def test_who_waits_is_told_when_the_deadline_comes(self, cache: TokenizerCache) -> None:
        slow = Slow()
        running = await slow.occupied(cache)
        with pytest.raises(RequestEvicted, match="The deadline came"):
            await asyncio.wait_for(slow.encoded(cache, "waiting", left_s=0.02), 5)
        assert len(cache._turns) == 0
        slow.go_on.set()
        await asyncio.wait_for(running, 5)

    async def test_failed_prompts_say_nothing_about_the_pace(self, clock: ManualClock) -> None:
        class Failing(Slow):
            def encode(self, *_: Any, **__: Any) -> list[int]:
                raise RequestRejected(RejectReason.INVALID, "no")

        cache, slow = TokenizerCache(threads=1, clock=clock), Slow(clock)
        failing = Failing(clock, pace=1e3)
        for _ in range(SURE_AFTER):
            with pytest.raises(RequestRejected):
                await failing.encoded(cache, "x")
        assert await slow.encoded(cache, "x", left_s=1.0) == [1]
        cache.close()


async def left_behind(ends: Awaitable[Any]) -> object:
    """The error that ``ends`` ends with, if something still holds it."""
    found: weakref.ref[BaseException] | None = None
    try:
        await ends
    except (RequestRejected, RequestEvicted) as error:
        found = weakref.ref(error)
    assert found is not None, "nothing was refused"
    for _ in range(50):  # the thread lets go of it in a moment
        await asyncio.sleep(0.01 if found() else 0)
    return found()


async def test_who_is_refused_leaves_no_cycles(cache: TokenizerCache) -> None:
    def refuse(_: str) -> None:
        raise RequestRejected(RejectReason.INVALID, "no")

    slow = Slow()
    gc.collect()
    gc.disable()
    try:
        assert await left_behind(cache.encode_chat(slow, [said("in a thread", LONG)], refuse)) is None
        running = await slow.occupied(cache)
        assert await left_behind(slow.encoded(cache, "late", left_s=0.01)) is None
        waiting = [slow.task(cache, name) for name in ("first", "second")]
        await asyncio.sleep(0)
        assert await left_behind(slow.encoded(cache, "one too many")) is None
        slow.go_on.set()
        await asyncio.wait_for(asyncio.gather(running, *waiting), 5)
    finally:
        gc.enable()


TEXTS = [{"text": LONG}, {"chat": inference_pb2.Chat(messages=[said("user", LONG)])}]


@pytest.mark.parametrize("prompt", TEXTS)
async def test_a_requests_prompt_waits_with_its_priority_and_deadline(
    monkeypatch: pytest.MonkeyPatch, prompt: dict[str, Any]
) -> None:
    turns: list[tuple[str, int, float | None]] = []

    async def encode(*_: Any, tenant: str, priority: int, left_s: float | None, **__: Any) -> list[int]:
        turns.append((tenant, priority, left_s))
        if priority == 7:
            raise RequestEvicted("too late")
        return [1]

    for name in ("encode", "encode_chat"):
        monkeypatch.setattr(TokenizerCache, name, encode)
    cluster = RouterCluster()
    options = {"vocab_size": 340, "max_model_len": 10_000, "tokenizer_files": FILES}
    try:
        await cluster.start(FakeEngine(hashed_token(340), **options))
        request = inference_pb2.GenerateRequest(**prompt, priority=7)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate(request, 9.0, (("x-tenant", "acme"),))
        assert from_rpc_error(caught.value)[:2] == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_BEFORE_START")
        assert await cluster.outcomes() == {"evicted_deadline": 1}
        await cluster.stub.Tokenize(inference_pb2.TokenizeRequest(**prompt))
        ((tenant, priority, left_s), other) = turns
        assert (tenant, priority, other) == ("acme", 7, ("", 0, None))
        assert left_s is not None
        assert 7.0 < left_s < 9.0
    finally:
        await cluster.close()


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
        for messages in ([said("long", LONG)], [said("many", "")] * (INLINE_MESSAGES + 1))
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
        await cache.encode_chat(Rendering(), [said("user", content)], refuse)


async def test_a_short_chat_that_becomes_long_waits_as_it_came(
    cache: TokenizerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[dict[str, Any]] = []

    async def encode(_tokenizer: object, text: str, **turn: Any) -> list[int]:
        turns.append({"text": text, **turn})
        return []

    monkeypatch.setattr(cache, "encode", encode)
    turn = {"tenant": "acme", "priority": 3, "left_s": 2.0}
    await cache.encode_chat(Slow(), [said("x", "")], lambda _: None, **turn)
    assert turns == [{"text": "x", "add_special_tokens": False, **turn}]


async def test_a_template_that_cannot_be_compiled_does_not_keep_its_model_away(cache: TokenizerCache) -> None:
    files = {**FILES, "chat_template.jinja": b"{% for %}"}
    tokenizer = await cache.build("d", files)
    with pytest.raises(RequestRejected, match="chat template"):
        await cache.encode_chat(tokenizer, [said("user", "fox?")], lambda _: None)


class Refused:
    """Refusals, each a new one."""

    def __init__(self) -> None:
        self.made: list[RequestRejected] = []

    def __call__(self) -> RequestRejected:
        self.made.append(RequestRejected(RejectReason.DRAINING, "stopping"))
        return self.made[-1]


async def test_prompts_that_need_a_thread_are_refused_when_the_router_ends(cache: TokenizerCache) -> None:
    slow, refused = Slow(), Refused()
    held = [await slow.occupied(cache), slow.task(cache, "first"), slow.task(cache, "second")]
    await asyncio.sleep(0)
    cache.refuse(refused)
    ends = await asyncio.wait_for(asyncio.gather(*held, return_exceptions=True), 1)
    with pytest.raises(RequestRejected) as caught:
        await asyncio.wait_for(slow.encoded(cache, "late"), 1)
    with pytest.raises(RequestRejected):
        await asyncio.wait_for(cache.encode(slow, LONG, add_special_tokens=True), 1)
    assert len(refused.made) == 5
    assert {id(end) for end in [*ends, caught.value]} == {id(made) for made in refused.made[:4]}
    assert await slow.encoded(cache, "short", content="x") == [5]
    slow.go_on.set()
    await asyncio.to_thread(cache._executor.shutdown)
    await asyncio.sleep(0)
    assert slow.rendered == ["slow", "short"]


class Source:
    """A replica's files: fetched so many times, and not before ``go_on``."""

    def __init__(self, files: Mapping[str, bytes] | Exception = FILES) -> None:
        self.files, self.fetches, self.go_on = files, 0, asyncio.Event()

    async def fetch(self) -> Mapping[str, bytes]:
        self.fetches += 1
        await self.go_on.wait()
        if isinstance(self.files, Exception):
            raise self.files
        return self.files

    def obtained(self, cache: TokenizerCache) -> asyncio.Task[Tokenizer]:
        return asyncio.create_task(cache.obtain("d", self.fetch))


class Builds:
    """Counts builds, none of which ends before ``go_on``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.started, self.go_on = 0, threading.Event(), threading.Event()
        plain = tokenizer_cache._build

        def build(files: Mapping[str, bytes]) -> Tokenizer:
            self.count += 1
            self.started.set()
            assert self.go_on.wait(5)
            return plain(files)

        monkeypatch.setattr(tokenizer_cache, "_build", build)

    async def began(self) -> None:
        assert await asyncio.to_thread(self.started.wait, 5)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


class TestOneTokenizerForManyReplicas:
    @pytest.fixture(autouse=True)
    def patient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever goes on has been told to."""
        monkeypatch.setattr(tokenizer_cache, "FETCH_PATIENCE_S", 60.0)

    async def test_is_fetched_and_built_once(self, cache: TokenizerCache, builds: Builds) -> None:
        source = Source()
        fetching = [source.obtained(cache) for _ in range(3)]
        await asyncio.sleep(0)
        source.go_on.set()
        await builds.began()
        building = [source.obtained(cache), asyncio.create_task(cache.build("d", FILES))]
        await asyncio.sleep(0)
        builds.go_on.set()
        made = await asyncio.wait_for(asyncio.gather(*fetching, *building, source.obtained(cache)), 5)
        assert len({id(one) for one in [*made, await source.obtained(cache)]}) == 1
        assert (source.fetches, builds.count) == (1, 1)
        assert cache._fetching == {}

    async def test_other_digests_do_not_wait(self, cache: TokenizerCache, builds: Builds) -> None:
        builds.go_on.set()
        held = Source().obtained(cache)
        await asyncio.sleep(0)
        await asyncio.wait_for(cache.build("e", FILES), 5)
        held.cancel()

    async def test_who_leaves_the_build_does_not_end_it(self, cache: TokenizerCache, builds: Builds) -> None:
        source = Source()
        source.go_on.set()
        tasks = [source.obtained(cache), asyncio.create_task(cache.build("d", FILES)), source.obtained(cache)]
        await builds.began()
        for leaving in tasks[:2]:
            leaving.cancel()
        await asyncio.wait(tasks[:2])
        assert [task.cancelled() for task in tasks[:2]] == [True, True]
        builds.go_on.set()
        await asyncio.wait_for(tasks[2], 5)
        assert (source.fetches, builds.count) == (1, 1)

    async def test_a_build_that_waits_for_a_thread_outlives_who_began_it(
        self, cache: TokenizerCache, builds: Builds
    ) -> None:
        slow = Slow()
        running = await slow.occupied(cache)
        tasks = [asyncio.create_task(cache.build("d", FILES)) for _ in range(2)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        builds.go_on.set()
        slow.go_on.set()
        await asyncio.wait_for(asyncio.gather(running, tasks[1]), 5)
        assert builds.count == 1

    async def test_a_failed_build_is_told_to_all_and_tried_again(self, cache: TokenizerCache, builds: Builds) -> None:
        source = Source({"tokenizer.json": b"{"})
        source.go_on.set()
        tasks = [source.obtained(cache) for _ in range(3)]
        await builds.began()
        builds.go_on.set()
        ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert [type(end) for end in ends] == [CheckpointError] * 3
        assert (source.fetches, builds.count) == (1, 1)
        source.files = FILES
        await asyncio.wait_for(source.obtained(cache), 5)
        assert (source.fetches, builds.count) == (2, 2)

    @pytest.mark.parametrize("leaves", [False, True])
    async def test_where_a_fetch_ends_early_the_next_one_fetches(
        self, cache: TokenizerCache, builds: Builds, *, leaves: bool
    ) -> None:
        builds.go_on.set()
        broken, sound = Source(ConnectionError()), Source()
        first, *others = [broken.obtained(cache), sound.obtained(cache), sound.obtained(cache)]
        await asyncio.sleep(0)
        assert (broken.fetches, sound.fetches) == (1, 0)
        if leaves:
            first.cancel()
        broken.go_on.set()
        sound.go_on.set()
        with pytest.raises(asyncio.CancelledError if leaves else ConnectionError):
            await first
        await asyncio.wait_for(asyncio.gather(*others), 5)
        assert (sound.fetches, builds.count) == (1, 1)

    async def test_a_replica_that_hangs_keeps_no_other_away(
        self, cache: TokenizerCache, builds: Builds, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer_cache, "FETCH_PATIENCE_S", 0.1)
        builds.go_on.set()
        hanging, slow, sound = Source(), Source(), Source()
        sound.go_on.set()
        held = [hanging.obtained(cache)]
        await asyncio.sleep(0)
        held += [slow.obtained(cache) for _ in range(2)]
        await eventually(lambda: slow.fetches > 0, "somebody has lost patience")
        assert slow.fetches == 1, "the others rely on that one now"
        others = [sound.obtained(cache) for _ in range(2)]
        await asyncio.sleep(0)
        assert sound.fetches == 0
        made = await asyncio.wait_for(asyncio.gather(*others), 5)
        assert (sound.fetches, builds.count) == (1, 1)
        hanging.go_on.set()
        slow.go_on.set()
        assert {id(one) for one in await asyncio.wait_for(asyncio.gather(*held), 5)} == {id(made[0])}
        assert (builds.count, cache._fetching) == (1, {})
