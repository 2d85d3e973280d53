"""Where a request would go and why: the Routing service over a real socket, and the command on top of it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from io import StringIO

import grpc
import pytest
from rich.console import Console

from cluster.cli import explain as command
from cluster.cli.explain import render_route
from cluster.cli.main import main
from cluster.router.endpoint_table import Standing
from cluster.router.policy.profiles import FILTERS
from cluster.v1 import inference_pb2, routing_pb2, routing_pb2_grpc
from tests.contract import small_tokenizers
from tests.contract.fake_engine import BLOCK_SIZE, FakeEngine, hashed_token
from tests.contract.router_cluster import RouterCluster, eventually

pytestmark = pytest.mark.integration
PROMPT = list(range(10, 10 + 5 * BLOCK_SIZE))  # five blocks


def request(prompt: list[int] = PROMPT, max_tokens: int = 4, **fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


async def explain(cluster: RouterCluster, asked: inference_pb2.GenerateRequest) -> routing_pb2.RouteExplanation:
    return await routing_pb2_grpc.RoutingStub(cluster.channel).ExplainRoute(asked, timeout=10)


def taken(explanation: routing_pb2.RouteExplanation) -> str:
    names = [row.replica for row in explanation.endpoints if row.taken]
    assert len(names) == 1
    return names[0]


def kept_out(row: routing_pb2.EndpointVerdict) -> dict[str, bool]:
    """The filters that it does not pass, and whether they are required."""
    return {rule.name: rule.required for rule in row.filters if not rule.passes}


def printed(explanation: routing_pb2.RouteExplanation) -> str:
    lines = StringIO()
    console = Console(width=200, file=lines)
    console.print(render_route(explanation))
    console.print(command._verdict(explanation))
    return lines.getvalue()


def slow_engine() -> FakeEngine:
    return FakeEngine(hashed_token(300), slot=1, vocab_size=300, max_num_seqs=4, step_s=0.05)


@asynccontextmanager
async def closing(made: RouterCluster):
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def cluster():
    files = small_tokenizers.files(small_tokenizers.byte_level())
    engines = [
        FakeEngine(hashed_token(300), slot=slot, vocab_size=400, tell_blocks=True, tokenizer_files=files)
        for slot in range(3)
    ]
    made = await RouterCluster().start(*engines)
    yield made
    await made.close()


async def test_garbage_is_its_senders_fault(cluster: RouterCluster) -> None:
    call = cluster.channel.unary_unary("/cluster.v1.Routing/ExplainRoute")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\xff\xff\xff", timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "GenerateRequest" in (caught.value.details() or "")


async def test_what_is_explained_is_what_is_done(cluster: RouterCluster) -> None:
    for number in range(6):
        asked = request([100 + number, *PROMPT])
        foretold = taken(await explain(cluster, asked))
        assert taken(await explain(cluster, asked)) == foretold, "an explanation moves nothing"
        before = [len(engine.submits) for engine in cluster.engines]
        await cluster.generate(asked)
        moved = [len(e.submits) - n for e, n in zip(cluster.engines, before, strict=True)]
        assert moved[int(foretold.rpartition("/")[2])] == 1
        assert sum(moved) == 1


async def test_every_endpoint_with_every_verdict(cluster: RouterCluster) -> None:
    await cluster.generate(request())
    home = next(e for e in cluster.engines if e.submits)
    name = str(home.endpoint.incarnation.replica)
    longer = [*PROMPT, 1, 2, 3]

    async def cached() -> int:
        rows = (await explain(cluster, request(longer))).endpoints
        return next(row.cached_tokens for row in rows if row.replica == name)

    async with asyncio.timeout(10):
        while await cached() != 5 * BLOCK_SIZE:
            await asyncio.sleep(0.01)
    explanation = await explain(cluster, request(longer))
    assert (explanation.policy, explanation.model, explanation.prompt_tokens) == ("default", "demo", 5 * BLOCK_SIZE + 3)
    assert taken(explanation) == name
    assert {row.replica for row in explanation.endpoints} == {"demo/0", "demo/1", "demo/2"}
    for row in explanation.endpoints:
        assert [f.name for f in row.filters][:3] == ["serves_model", "session_up", "not_draining"]
        assert all(f.passes for f in row.filters)
        assert row.qualifies
        assert [s.name for s in row.scores] == ["cached_prefix", "short_queue", "at_home"]
        assert row.total == pytest.approx(sum(s.weight * s.score for s in row.scores))
        assert row.standing == "HEALTHY"
    assert max(explanation.endpoints, key=lambda row: row.total).replica == name


async def test_who_is_kept_out_says_by_what(cluster: RouterCluster) -> None:
    cluster.engines[0].dead.set()
    await cluster.until_ready(2)
    explanation = await explain(cluster, request())
    row = next(row for row in explanation.endpoints if row.replica == "demo/0")
    assert "session_up" in [f.name for f in row.filters if not f.passes]
    assert not row.qualifies
    assert not row.taken
    assert [score.name for score in row.scores] == ["cached_prefix", "short_queue", "at_home"]
    printed = StringIO()
    Console(width=200, file=printed).print(render_route(explanation))
    [line] = [line for line in printed.getvalue().splitlines() if "demo/0#1" in line]
    assert "session_up" in line
    assert f"({row.total:.3f})" in line


async def test_a_slow_replica_with_room_is_kept_out_while_a_sound_one_is_full() -> None:
    """What is explained is what the desk does: a request waits for the sound one."""
    full, slow = FakeEngine(hashed_token(300), vocab_size=300, max_num_seqs=1, step_s=0.05), slow_engine()
    async with closing(await RouterCluster().start(full, slow)) as made:
        health, incarnation = made.router.fleet.health, slow.endpoint.incarnation
        judged = health.standing
        health.standing = lambda other: Standing.SLOW if other == incarnation else judged(other)
        assert taken(await explain(made, request())) == "demo/0"
        running = [asyncio.create_task(made.generate(request(max_tokens=100))) for _ in range(3)]
        await eventually(lambda: not made.router.fleet._sessions[full.endpoint.incarnation].load.has_room, "it is full")
        explanation = await explain(made, request())
        rows = {row.replica: row for row in explanation.endpoints}
        assert [row.qualifies or row.taken for row in rows.values()] == [False, False]
        assert kept_out(rows["demo/1"]) == {"not_slow": True}
        assert kept_out(rows["demo/0"]) == {"has_room": True, "not_full": False}
        assert not slow.submits
        [line] = [line for line in printed(explanation).splitlines() if "demo/1#1" in line]
        assert " not_slow " in line
        assert f"({rows['demo/1'].total:.3f})" in line
        assert "would wait: a sound endpoint, full for now" in printed(explanation)
        health.standing = lambda _: Standing.SLOW
        explanation = await explain(made, request())
        assert taken(explanation) == "demo/1"
        assert kept_out(next(row for row in explanation.endpoints if row.taken)) == {"not_slow": False}
        health.standing = judged
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_while_no_replica_is_up_every_endpoint_says_what_keeps_it_out(capsys: pytest.CaptureFixture[str]) -> None:
    made = await RouterCluster(engine_silence_s=0.5).start(FakeEngine(hashed_token(300), vocab_size=300), slow_engine())
    async with closing(made):
        for engine in made.engines:
            engine.dead.set()
        await made.until_ready(0)
        for asked in (request(), request(model="demo")):
            explanation = await explain(made, asked)
            assert (explanation.model, explanation.prompt_tokens) == ("demo", len(PROMPT))
            assert {row.replica for row in explanation.endpoints} == {"demo/0", "demo/1"}
            for row in explanation.endpoints:
                assert kept_out(row)["session_up"]
                assert not any((row.qualifies, row.taken, row.looked_at))
        assert f"A prompt of {len(PROMPT)} tokens would be refused" in printed(explanation)
        words = inference_pb2.GenerateRequest(text="hello there", request_id="1")
        assert (await explain(made, words)).prompt_tokens == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await explain(made, request(model="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

        def run() -> str:
            with pytest.raises(SystemExit) as left:
                main(["explain", "route", "hello there", "--address", made.address])
            assert left.value.code == 0
            return " ".join(capsys.readouterr().out.split())

        told = await asyncio.to_thread(run)
        assert "which counts 0 tokens as no replica of the model is up" in told
        assert "would be refused" in told
        assert told.partition("policy default")[2].count("session_up") == 2
        assert await made.outcomes() == {}


async def test_without_any_model_there_is_nothing_to_explain() -> None:
    async with closing(await RouterCluster().start()) as made:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await explain(made, request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_command_knows_the_filters() -> None:
    assert {rule.name for rule in FILTERS if rule.static} == command._LASTING
    assert {rule.name for rule in FILTERS} >= command._SOUND


async def test_errors_are_those_of_generate(cluster: RouterCluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await explain(cluster, request(model="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await explain(cluster, request([]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await cluster.outcomes() == {}


async def test_the_command_prints_a_table_and_json(cluster: RouterCluster, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["explain", "route", "hello there", "--address", cluster.address, *arguments])
        printed = capsys.readouterr()
        assert left.value.code == 0, printed.err
        return printed.out

    values = json.loads(await asyncio.to_thread(run, "--json"))
    chosen = [row["replica"] for row in values["endpoints"] if row["taken"]]
    assert len(values["endpoints"]) == 3
    table = await asyncio.to_thread(run)
    assert f"would go to {chosen[0]}" in table
    assert all(name in table for name in ("cached_prefix", "short_queue", "demo/2#1"))
    await eventually(lambda: not any(engine.submits for engine in cluster.engines), "nothing was sent")


async def test_what_was_expected_to_be_cached_is_counted_beside_what_was(cluster: RouterCluster) -> None:
    await cluster.generate(request())
    longer = request([*PROMPT, 1, 2, 3])

    async def foreseen() -> int:
        return max(row.cached_tokens for row in (await explain(cluster, longer)).endpoints)

    async with asyncio.timeout(10):
        while await foreseen() != 5 * BLOCK_SIZE:
            await asyncio.sleep(0.01)
    answer = await cluster.generate(longer)
    assert answer.end.usage.cached_prompt_tokens == 5 * BLOCK_SIZE
    page = await cluster.metrics()
    for name in ("expected_cached", "cached"):
        assert f'cluster_router_{name}_prompt_tokens_total{{model="demo"}} {5 * BLOCK_SIZE}.0' in page
