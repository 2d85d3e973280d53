"""Routers that die under their clients: kill -9 of a real router process, and the stream goes on at another one."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from cluster.client import AsyncClient, Chunk, Client, Completion
from cluster.domain.errors import RejectReason, RequestRejected
from cluster.router.tokenization import Tokenizer
from cluster.v1 import engine_pb2, inference_pb2, inference_pb2_grpc
from cluster.wire import channel
from tests.contract import small_tokenizers
from tests.contract.fake_control import FakeControl
from tests.contract.fake_engine import DIGEST, FakeEngine, scripted_token
from tests.contract.router_cluster import RouterCluster, eventually
from tests.contract.router_processes import RouterProcess, kill, own_connection

pytestmark = pytest.mark.integration
VOCAB = 340
FILES = small_tokenizers.files(small_tokenizers.byte_level())
TOKENIZER = Tokenizer(FILES)
PROMPT = [5, 6, 7]
TOKENS = 40
GREEDY = {"seed": 3}
SAMPLED = {
    "temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 11, "repetition_penalty": 1.2, "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
}  # fmt: skip


def drawn(submit: engine_pb2.Submit, generated: Sequence[int]) -> int:
    """A token that depends on all there is: prompt, what was generated, and every number of the sampling."""
    import hashlib

    text = f"{list(submit.prompt_token_ids)}{list(generated)}{submit.sampling.SerializeToString(deterministic=True)!r}"
    return 3 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % (VOCAB - 3)


def slow_engine(digest: str = DIGEST) -> FakeEngine:
    return FakeEngine(
        drawn, draw=drawn, vocab_size=VOCAB, max_model_len=4096, tokenizer_files=FILES, step_s=0.004,
        tokens_per_step=1, digest=digest,
    )  # fmt: skip


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    started = await slow_engine().start()
    yield started
    await started.stop()


@pytest.fixture
async def control(engine: FakeEngine) -> AsyncIterator[FakeControl]:
    started = await FakeControl().start()
    await started.push(engine.endpoint)
    yield started
    await started.stop()


async def routers(control: FakeControl, count: int) -> list[RouterProcess]:
    started = await asyncio.gather(*(RouterProcess.start(control.address) for _ in range(count)))
    await asyncio.gather(*(router.until_ready() for router in started))
    return started


class Story:
    """What a client was told, chunk by chunk."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[tuple[int, float]] = []
        self.whole: Completion | None = None

    def take(self, event: Any) -> None:
        if isinstance(event, Completion):
            self.whole = event
            return
        assert self.whole is None
        self.token_ids += event.token_ids
        self.text += event.text
        self.logprobs += [(one.token_id, one.logprob) for one in event.logprobs]

    def same_as(self, other: "Story") -> bool:
        assert self.whole is not None
        assert other.whole is not None
        assert self.whole.text == self.text
        assert list(self.whole.token_ids) == self.token_ids
        assert self.whole.usage.generated_tokens == len(self.token_ids)
        mine = (self.token_ids, self.text, self.logprobs, self.whole.finish_reason)
        return mine == (other.token_ids, other.text, other.logprobs, other.whole.finish_reason)


async def tell(client: AsyncClient, **options: Any) -> Story:
    story = Story()
    async for event in client.generate(PROMPT, max_tokens=TOKENS, **options):
        story.take(event)
    return story


async def test_kill_9_of_a_router_changes_nothing(engine: FakeEngine, control: FakeControl) -> None:
    """Three routers; each of the first two is killed under four streams, after any number of their tokens."""
    first, second, third = started = await routers(control, 3)
    try:
        addresses = [router.address for router in started]
        async with AsyncClient(third.address) as calm:
            plain = await tell(calm, **GREEDY)
            stop = TOKENIZER.decode(plain.token_ids)[30:36]
            kinds: list[dict[str, Any]] = [GREEDY, SAMPLED, {"stop": stop, **GREEDY}, {"logprobs": 2, **SAMPLED}]
            expected = [await tell(calm, **options) for options in kinds]
        assert expected[2].whole is not None
        assert expected[2].whole.finish_reason == "stop"
        assert expected[3].logprobs
        engine.submits.clear()
        async with AsyncClient(addresses) as client:
            streams = [asyncio.create_task(tell(client, **options)) for options in kinds]
            await eventually(lambda: sum(s.sent for s in engine.running.values()) >= 20, "some tokens came")
            first.kill()
            await eventually(lambda: len(engine.submits) >= 5, "the second router goes on")
            second.kill()
            told = await asyncio.gather(*streams)
        for story, whole in zip(told, expected, strict=True):
            assert story.same_as(whole)
        assert sum(story.whole.usage.resumes for story in told if story.whole) >= 4
        assert all(
            list(submit.generated_token_ids) == whole[: len(submit.generated_token_ids)]
            for submit in engine.submits
            for whole in [next(e.token_ids for e in expected if same_request(submit, e))]
        )
        await eventually(lambda: not engine.running, "what the dead routers ran is gone")
        await blocking_client_resumes(control, third, expected[0])
        await nobody_is_left(third, control)
    finally:
        for router in started:
            await router.close()


async def test_every_stream_goes_on_when_the_only_router_comes_back(engine: FakeEngine, control: FakeControl) -> None:
    """Many more calls in vain than are free, and every one of them by one client."""
    streams = 150
    router = await RouterProcess.start(control.address)
    again: RouterProcess | None = None
    try:
        await router.until_ready()
        async with AsyncClient(router.address) as client:
            expected = await tell(client, **GREEDY)
            engine.step_s = 0.3
            running = [asyncio.create_task(tell(client, **GREEDY)) for _ in range(streams)]
            await eventually(lambda: len(engine.running) == streams, "all are there", 20.0)
            await eventually(lambda: all(s.sent >= 2 for s in engine.running.values()), "all have tokens", 20.0)
            router.kill()
            await router.process.wait()
            engine.step_s = 0.004
            again = await RouterProcess.start(control.address, port=router.ports["grpc"])
            for story in await asyncio.wait_for(asyncio.gather(*running), 60):
                assert story.same_as(expected)
    finally:
        await router.close()
        if again is not None:
            await again.close()


def serving_pid(control: FakeControl, router: RouterProcess) -> int:
    """The process of ``router`` that has a connection of ours."""
    port = router.ports["grpc"]
    ours = {one.laddr.port for one in psutil.Process().net_connections("tcp") if one.raddr and one.raddr.port == port}
    for pid in [watcher.pid for watcher in control.watchers]:
        for one in psutil.Process(pid).net_connections("tcp"):
            if one.raddr and one.laddr.port == port and one.raddr.port in ours:
                return pid
    raise AssertionError("nobody serves us")


async def test_a_request_that_waits_in_a_process_that_dies_is_served_by_another(
    engine: FakeEngine, control: FakeControl
) -> None:
    """Two processes have the one address; the request has no token yet."""
    router = await RouterProcess.start(control.address, processes=2)
    try:
        await router.until_ready()
        async with AsyncClient(router.address) as client:
            expected = await tell(client, **SAMPLED)
            engine.submits.clear()
            engine.start_delay_s = 1.0
            running = asyncio.create_task(tell(client, **SAMPLED))
            await eventually(lambda: len(engine.submits) == 1, "the engine has it")
            kill(serving_pid(control, router))
            story = await running
            assert story.same_as(expected)
            assert story.whole is not None
            assert story.whole.usage.resumes >= 1
        assert len(engine.submits) >= 2
        assert not engine.submits[-1].generated_token_ids
    finally:
        await router.end()
        await router.close()


def same_request(submit: engine_pb2.Submit, story: Story) -> bool:
    known = list(submit.generated_token_ids)
    return story.token_ids[: len(known)] == known


async def blocking_client_resumes(control: FakeControl, last: RouterProcess, expected: Story) -> None:
    victim = (await routers(control, 1))[0]

    def talk() -> Story:
        story = Story()
        with Client([victim.address, last.address]) as client:
            for event in client.generate(PROMPT, max_tokens=TOKENS, **GREEDY):
                story.take(event)
                if len(story.token_ids) == 3:
                    victim.kill()
        return story

    try:
        assert (await asyncio.to_thread(talk)).same_as(expected)
    finally:
        await victim.close()


async def rest_of(call: Any) -> None:
    while await call.read():
        continue


async def told_to_the_end(events: AsyncIterator[Any]) -> None:
    async for _ in events:
        continue


async def nobody_is_left(last: RouterProcess, control: FakeControl) -> None:
    """A plain gRPC client gets UNAVAILABLE; ours tries again for a while, and says so in one sentence."""
    async with own_connection(last.address) as opened, AsyncClient(last.address, resumes_max=2) as client:
        message = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=PROMPT))
        call = inference_pb2_grpc.InferenceStub(opened).Generate(message)
        events = client.generate(PROMPT, max_tokens=1000)
        await asyncio.gather(call.read(), anext(events))
        last.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest_of(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(RequestRejected, match=f"No router answers at {last.address}") as refused:
            await told_to_the_end(events)
        assert refused.value.reject_reason is RejectReason.NO_ENDPOINT


@pytest.mark.parametrize("known", [4, TOKENS])
async def test_the_end_of_a_text_that_came_already_does_not_come_again(known: int) -> None:
    """The router died between the last text, which belongs to no token, and the End."""
    cluster = await RouterCluster().start(slow_engine())
    try:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=PROMPT), sampling=inference_pb2.Sampling(max_tokens=TOKENS, seed=2),
            return_token_ids=True,
        )  # fmt: skip
        whole = await cluster.generate(request)
        held_back = whole.text[-3:]  # might be the beginning of a stop string
        request.sampling.stop.append(held_back + "zzz")
        text = (await cluster.generate(request)).text
        assert text == whole.text
        request.generated_token_ids.extend(whole.token_ids[:known])
        rest = await cluster.generate(request)
        assert text.endswith(rest.text)
        assert rest.text
        request.received_characters = len(text) if known == TOKENS else len(text) - len(rest.text)
        again = await cluster.generate(request)
        assert again.text == ("" if known == TOKENS else rest.text)
        assert (again.token_ids, again.reason) == (whole.token_ids[known:], "LENGTH")
    finally:
        await cluster.close()


async def test_a_text_whose_end_has_come_goes_on_behind_it() -> None:
    """What might be a stop's beginning came with the end of the first call; the second one has more tokens."""
    script = Tokenizer(FILES).encode("hello STO many times and goes home ST")
    engine = FakeEngine(scripted_token(script), vocab_size=VOCAB, max_model_len=4096, tokenizer_files=FILES)
    cluster = await RouterCluster().start(engine)
    try:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=PROMPT), sampling=inference_pb2.Sampling(max_tokens=len(script)),
            return_token_ids=True,
        )  # fmt: skip
        request.sampling.stop.append("STOP")
        whole = await cluster.generate(request)
        for known in range(1, len(script)):
            request.ClearField("generated_token_ids")
            request.received_characters, request.sampling.max_tokens = 0, known
            first = await cluster.generate(request)
            request.sampling.max_tokens = len(script)
            request.generated_token_ids.extend(first.token_ids)
            request.received_characters = len(first.text)
            rest = await cluster.generate(request)
            assert first.text + rest.text == whole.text
            request.received_characters = 10_000  # whoever counts in other units loses a word at most
            assert whole.text.endswith((await cluster.generate(request)).text)
        request.ClearField("generated_token_ids")
        request.generated_token_ids.extend(whole.token_ids[:2])
        assert len((await cluster.generate(request)).text) > len(whole.text) / 3
    finally:
        await cluster.close()


class Leaving(inference_pb2_grpc.InferenceServicer):
    """A router that leaves behind a stream's first token."""

    async def Generate(self, _request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield inference_pb2.GenerateResponse(chunk=inference_pb2.Chunk(token_ids=[5], checkpoint_digest="sha256:old"))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


async def test_tokens_of_other_weights_are_not_gone_on_with() -> None:
    """The router has left, and what the next one routes to is another checkpoint by now."""
    leaving = channel.new_server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Leaving(), leaving)
    port = channel.bind(leaving, "127.0.0.1", 0)
    await leaving.start()
    cluster = await RouterCluster().start(slow_engine("sha256:new"))
    try:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=PROMPT), sampling=inference_pb2.Sampling(max_tokens=TOKENS, seed=2),
            return_token_ids=True,
        )  # fmt: skip
        told = [event.chunk.checkpoint_digest async for event in cluster.call(request) if event.HasField("chunk")]
        assert told[0] == "sha256:new"
        assert not any(told[1:]), "once is enough"
        submits = len(cluster.engines[0].submits)
        async with AsyncClient(f"127.0.0.1:{port}", cluster.address, resumes_max=1) as client:
            with pytest.raises(RequestRejected, match="what this request began with"):
                [event async for event in client.generate(PROMPT, max_tokens=TOKENS, seed=2)]
        async with AsyncClient(cluster.address) as client:  # by hand as well
            with pytest.raises(RequestRejected, match="what this request began with"):
                await client.complete(PROMPT, generated_token_ids=[5], checkpoint_digest="sha256:old")
            assert len(cluster.engines[0].submits) == submits
            events = client.generate(PROMPT, generated_token_ids=[5], checkpoint_digest="sha256:new", max_tokens=TOKENS)
            assert {event.checkpoint_digest async for event in events if isinstance(event, Chunk)} == {"sha256:new"}
        cluster.injected += 3
        assert (await cluster.outcomes())["rejected_unavailable"] == 2
    finally:
        await leaving.stop(0)
        await cluster.close()


def test_the_client_is_small() -> None:
    """No torch, no Ray, nothing of the server side."""
    program = "import sys, cluster.client; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    heavy = {"torch", "ray", "transformers", "deepspeed", "numpy", "tokenizers", "prometheus_client", "structlog"}
    assert not heavy & set(loaded.stdout.split())
    program = "import sys, cluster.client; print(*(name for name in sys.modules if name.startswith('cluster.')))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    rooms = {name.split(".")[1] for name in loaded.stdout.split()}
    assert rooms <= {"client", "config", "domain", "v1", "wire"}
