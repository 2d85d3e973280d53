"""A router on real sockets between fake engines: streaming, failover, ends of every kind."""

import asyncio
import math
import random
from collections.abc import Awaitable, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.domain.endpoint import Endpoint
from cluster.router.placing import SENT_BACK_MAX
from cluster.router.tokenization import Tokenizer
from cluster.v1 import engine_pb2, inference_pb2
from cluster.wire.http2.messages import INFLATED_BYTES_MAX
from cluster.wire.status import from_rpc_error
from tests.contract import small_tokenizers
from tests.contract.fake_engine import FakeEngine, expected_tokens, hashed_token, scripted_token
from tests.contract.router_cluster import RouterCluster, StartCluster, eventually

pytestmark = pytest.mark.integration

VOCAB = 340
NEXT = hashed_token(VOCAB)
FILES = small_tokenizers.files(small_tokenizers.byte_level())
TOKENIZER = Tokenizer(FILES)
PROMPT = [5, 6, 7]


def engine(slot: int = 0, **options: Any) -> FakeEngine:
    options.setdefault("next_token", NEXT)
    options.setdefault("vocab_size", VOCAB)
    return FakeEngine(slot=slot, **options)


def with_text(slot: int = 0, **options: Any) -> FakeEngine:
    return engine(slot, tokenizer_files=FILES, **options)


def request(max_tokens: int = 12, **fields: Any) -> inference_pb2.GenerateRequest:
    sampling = fields.pop("sampling", {})
    message = inference_pb2.GenerateRequest(
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, **{"seed": 9, **sampling}),
        return_token_ids=True,
        **fields,
    )
    if message.WhichOneof("prompt") is None:
        message.token_ids.ids.extend(PROMPT)
    return message


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, str, float | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


class TestStreaming:
    async def test_tokens_and_text_of_a_whole_request(self, start: StartCluster) -> None:
        cluster = await start(with_text(step_s=0.002))  # steps of one turn of the event loop go out together
        answer = await cluster.generate(request(30))
        expected = expected_tokens(NEXT, PROMPT, 9, 30)
        assert answer.token_ids == expected
        assert answer.text == TOKENIZER.decode(expected)
        assert answer.reason == "LENGTH"
        assert answer.chunks >= 30
        usage = answer.end.usage
        assert (usage.prompt_tokens, usage.generated_tokens, usage.failovers, usage.seed) == (3, 30, 0, 9)
        assert await cluster.outcomes() == {"completed": 1}

    async def test_complete_answers_the_same_at_once(self, start: StartCluster) -> None:
        cluster = await start(with_text())
        completion = await cluster.complete(request(20, logprobs=1))
        expected = expected_tokens(NEXT, PROMPT, 9, 20)
        assert list(completion.token_ids) == expected
        assert completion.text == TOKENIZER.decode(expected)
        assert [p.token_id for p in completion.logprobs] == expected
        assert completion.usage.generated_tokens == 20

    async def test_text_prompts_and_chats_are_tokenized_and_echo_their_id(self, start: StartCluster) -> None:
        cluster = await start(with_text())
        call = cluster.call(request(2, text="The fox", request_id="mine-1"))
        assert [event async for event in call][-1].HasField("end")
        assert ("x-request-id", "mine-1") in list(await call.trailing_metadata())
        call = cluster.call(request(2, text="The fox"))
        assert [len(value) for key, value in await call.initial_metadata() if key == "x-request-id"] == [32]
        assert [event async for event in call][-1].HasField("end")
        chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="fox?")])
        await cluster.generate(request(2, chat=chat))
        sent = [list(s.prompt_token_ids) for s in cluster.engines[0].submits]
        del sent[1]
        assert sent == [TOKENIZER.encode("The fox"), TOKENIZER.encode("<s><|user|>fox?</s>\n<|assistant|>")]
        tokens = await cluster.stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
        assert list(tokens.ids) == sent[1]

    async def test_a_long_prompt_passes_every_message_limit(self, start: StartCluster) -> None:
        cluster = await start(engine(max_model_len=3_000_000, vocab_size=300_000))
        ids = inference_pb2.TokenIds(ids=[260_000] * 2_000_000)  # three bytes each: over the usual 4 MiB
        answer = await cluster.generate(request(2, token_ids=ids))
        assert answer.end.usage.prompt_tokens == 2_000_000

    async def test_a_model_without_a_tokenizer_serves_token_ids(self, start: StartCluster) -> None:
        cluster = await start(engine())
        message = request(4)
        message.return_token_ids = False
        answer = await cluster.generate(message)
        assert answer.token_ids == expected_tokens(NEXT, PROMPT, 9, 4)
        assert answer.text == ""
        code, reason, text, _ = await refusal(cluster.generate(request(4, text="hello")))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID")
        assert "token_ids" in text

    async def test_default_sampling_end_tokens_and_derived_seed(self, start: StartCluster) -> None:
        defaults = inference_pb2.Sampling(temperature=0.5, top_p=0.75)
        cluster = await start(engine(default_sampling=defaults, end_token_ids=(3,), max_model_len=10))
        message = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=PROMPT), request_id="abc")
        answer = await cluster.generate(message)
        sent = cluster.engines[0].submits[0].sampling
        assert (sent.temperature, sent.top_p, sent.max_tokens) == (0.5, 0.75, 7)
        assert list(sent.stop_token_ids) == [3]
        assert answer.end.usage.seed == sent.seed != 0

    async def test_what_one_turn_of_the_loop_submits_and_cancels_is_one_message(self, start: StartCluster) -> None:
        cluster = await start(engine(step_s=0.005))
        (session,) = cluster.router.fleet._sessions.values()
        sampling = inference_pb2.Sampling(max_tokens=100)
        sequences = [
            session.submit(engine_pb2.Submit(prompt_token_ids=PROMPT, sampling=sampling), 3, 100)[0] for _ in range(40)
        ]
        await eventually(lambda: len(cluster.engines[0].running) == 40, "all are running")
        assert cluster.engines[0].commands == 1
        for sequence_id in sequences:
            session.release(sequence_id)
        await eventually(lambda: not cluster.engines[0].running, "all are cancelled")
        assert cluster.engines[0].commands == 2

    async def test_many_requests_share_a_session(self, start: StartCluster) -> None:
        cluster = await start(engine(step_s=0.005))
        answers = await asyncio.gather(*(cluster.generate(request(8)) for _ in range(40)))
        assert all(a.token_ids == expected_tokens(NEXT, PROMPT, 9, 8) for a in answers)
        assert cluster.engines[0].sessions == 1

    async def test_models_are_listed(self, start: StartCluster) -> None:
        cluster = await start(with_text(), with_text(1))
        (model,) = (await cluster.stub.ListModels(inference_pb2.ListModelsRequest())).models
        assert (model.name, model.ready_replicas, model.vocab_size, model.max_model_len) == ("demo", 2, VOCAB, 256)

    async def test_work_is_spread(self, start: StartCluster) -> None:
        cluster = await start(engine(0, step_s=0.01), engine(1, step_s=0.01))
        await asyncio.gather(*(cluster.generate(request(5)) for _ in range(20)))
        counts = sorted(len(e.submits) for e in cluster.engines)
        assert counts[0] >= 8


DRAWN_FROM = range(40, 50)  # few, so that penalties matter


def drawn(submit: engine_pb2.Submit, generated: Sequence[int]) -> int:
    """A small sampler: temperature, all three penalties, and a draw that is a function of seed and position."""
    sampling = submit.sampling
    known = list(submit.prompt_token_ids) + list(generated)
    scores = random.Random(str(known[-1]))
    logits = {token: scores.gauss(0.0, 2.0) for token in DRAWN_FROM}
    for token in logits.keys() & set(known):
        sign = 1 if logits[token] < 0 else -1
        logits[token] *= sampling.repetition_penalty**sign
    for token in logits.keys() & set(generated):
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * list(generated).count(token)
    weights = [math.exp(logit / sampling.temperature) for logit in logits.values()]
    return random.Random(f"{sampling.seed} {len(generated)}").choices(list(logits), weights)[0]


SAMPLED = {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 1.2, "frequency_penalty": 0.7, "seed": 77}
SCRIPT = TOKENIZER.encode("The fox 👩‍👩‍👧 says STOP now and 한국 later")
STOPPED = "The fox 👩‍👩‍👧 says "


class TestFailover:
    @pytest.mark.parametrize("cut", range(1, 13))
    async def test_no_gap_no_duplicate_no_change_at_any_cut(self, start: StartCluster, cut: int) -> None:
        cluster = await start(with_text(0, die_after=cut), with_text(1, die_after=100))
        await cluster.control.push(cluster.engines[0].endpoint)
        await cluster.until_ready(1)
        call = asyncio.create_task(cluster.generate(request(12, logprobs=1)))
        await eventually(lambda: bool(cluster.engines[0].submits), "the first engine has it")
        await cluster.control.push(*(e.endpoint for e in cluster.engines))
        answer = await call
        expected = expected_tokens(NEXT, PROMPT, 9, 12)
        assert answer.token_ids == expected
        assert [p.token_id for p in answer.logprobs] == expected
        assert [p.logprob for p in answer.logprobs] == [-i for i in range(1, 13)]
        assert answer.text == TOKENIZER.decode(expected)
        assert answer.end.usage.generated_tokens == 12
        assert answer.end.usage.failovers == (1 if cut < 12 else 0)
        if cut < 12:
            (second,) = cluster.engines[1].submits
            assert list(second.generated_token_ids) == expected[: len(second.generated_token_ids)]
            assert second.attempt == 2

    @pytest.mark.parametrize("cut", range(1, len(SCRIPT) + 1))
    async def test_a_stop_string_straddles_any_cut(self, start: StartCluster, cut: int) -> None:
        script = scripted_token(SCRIPT)
        cluster = await start(with_text(0, next_token=script, die_after=cut, vocab_size=400))
        spare = with_text(1, next_token=script, vocab_size=400)
        cluster.engines.append(await spare.start())
        call = asyncio.create_task(cluster.generate(request(len(SCRIPT), sampling={"stop": ["STOP now", "zzz"]})))
        await eventually(lambda: bool(cluster.engines[0].submits), "the first engine has it")
        await cluster.control.push(*(e.endpoint for e in cluster.engines))
        answer = await call
        assert answer.text == STOPPED
        assert answer.reason == "STOP"
        stop_at = len(answer.token_ids)
        assert answer.token_ids == SCRIPT[:stop_at]
        assert "STOP now" in TOKENIZER.decode(SCRIPT[:stop_at])
        assert "STOP now" not in TOKENIZER.decode(SCRIPT[: stop_at - 1])
        assert answer.end.usage.generated_tokens == stop_at

    @pytest.mark.parametrize("cut", [1, 5, 11, 12, 13])
    async def test_sampling_with_penalties_and_a_stop_string_goes_on_the_same(
        self, start: StartCluster, cut: int
    ) -> None:
        whole: list[int] = []
        for _ in range(16):
            sampling = inference_pb2.Sampling(max_tokens=16, **SAMPLED)
            whole.append(drawn(engine_pb2.Submit(prompt_token_ids=PROMPT, sampling=sampling), whole))
        before, stop = TOKENIZER.decode(whole[:10]), TOKENIZER.decode(whole[10:13])
        assert stop
        assert stop not in TOKENIZER.decode(whole[:12])
        cluster = await start(with_text(0, draw=drawn, die_after=cut))
        spare = with_text(1, draw=drawn)
        cluster.engines.append(await spare.start())
        call = asyncio.create_task(cluster.generate(request(16, sampling={**SAMPLED, "stop": [stop]})))
        await eventually(lambda: bool(cluster.engines[0].submits), "the first engine has it")
        await cluster.control.push(*(e.endpoint for e in cluster.engines))
        answer = await call
        assert (answer.token_ids, answer.text, answer.reason) == (whole[:13], before, "STOP")
        if cut < 13:
            (first,), (second,) = cluster.engines[0].submits, spare.submits
            assert second.sampling == first.sampling
            assert list(second.generated_token_ids) == whole[: len(second.generated_token_ids)]

    async def test_a_silent_leader_is_left_in_time(self, start: StartCluster) -> None:
        cluster = await start(engine(0, step_s=0.02), engine(1, step_s=0.02), engine_silence_s=0.4)
        call = asyncio.create_task(cluster.generate(request(20)))
        await eventually(lambda: any(e.running for e in cluster.engines), "one is running")
        first = next(e for e in cluster.engines if e.running)
        other = cluster.engines[1 - first.slot]
        await asyncio.sleep(0.1)
        first.silent = True
        before = asyncio.get_running_loop().time()
        await eventually(lambda: bool(other.submits), "the other engine has it")
        assert 0.2 < asyncio.get_running_loop().time() - before < 1.5
        assert (await call).token_ids == expected_tokens(NEXT, PROMPT, 9, 20)
        assert 'cluster_router_failovers_total{reason="silent"} 1.0' in await cluster.metrics()

    async def test_a_leader_whose_step_hangs_is_left_until_it_works_again(self, start: StartCluster) -> None:
        cluster = await start(engine(0, step_s=0.02), engine(1, step_s=0.02), engine_step_deadline_s=30.0)
        call = asyncio.create_task(cluster.generate(request(20)))
        await eventually(lambda: any(e.running for e in cluster.engines), "one is running")
        first = next(e for e in cluster.engines if e.running)
        first.step_age_s = 30.5
        assert (await call).token_ids == expected_tokens(NEXT, PROMPT, 9, 20)
        assert 'cluster_router_failovers_total{reason="stuck"} 1.0' in await cluster.metrics()
        await eventually(lambda: first.sessions == 2, "it is met again")
        given = len(first.submits)
        for _ in range(4):
            await cluster.generate(request(4))
        assert len(first.submits) == given
        assert cluster.router.fleet.ready_replicas("demo") == 1
        first.step_age_s = 0.0
        await cluster.until_ready(2)
        assert first.sessions == 2

    async def test_an_endpoint_taken_out_of_the_table_is_left_at_once(self, start: StartCluster) -> None:
        cluster = await start(engine(0, step_s=0.02), engine(1, step_s=0.02))
        call = asyncio.create_task(cluster.generate(request(30)))
        await eventually(lambda: any(e.running for e in cluster.engines), "one is running")
        first = next(e for e in cluster.engines if e.running)
        await cluster.control.push(cluster.engines[1 - first.slot].endpoint)
        assert (await call).token_ids == expected_tokens(NEXT, PROMPT, 9, 30)
        assert 'cluster_router_failovers_total{reason="removed"} 1.0' in await cluster.metrics()

    async def test_a_request_waits_for_its_replica_to_come_back(self, start: StartCluster) -> None:
        cluster = await start(engine(0, die_after=3))
        call = asyncio.create_task(cluster.generate(request(9)))
        await eventually(lambda: not cluster.router.fleet.ready, "nobody is ready")
        await eventually(lambda: cluster.engines[0].dead.is_set(), "the engine is dead")
        reborn = engine(0, generation=2)
        cluster.engines.append(await reborn.start())
        assert not call.done()
        await cluster.control.push(reborn.endpoint)
        answer = await call
        assert answer.token_ids == expected_tokens(NEXT, PROMPT, 9, 9)
        assert answer.end.usage.failovers == 1

    async def test_nobody_waits_longer_than_failover_wait(self, start: StartCluster) -> None:
        cluster = await start(engine(0, die_after=3), failover_wait_s=0.2)
        code, reason, message, _ = await refusal(cluster.generate(request(9)))
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "REPLICA_FAILED")
        assert "failover_wait_s" in message
        assert await cluster.outcomes() == {"failed_replica": 1}

    async def test_failovers_are_counted_and_bounded(self, start: StartCluster) -> None:
        cluster = await start(*(engine(i, die_after=2) for i in range(3)), max_failovers=1)
        code, reason, message, _ = await refusal(cluster.generate(request(9)))
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "REPLICA_FAILED")
        assert "max_failovers 1" in message

    async def test_other_weights_never_continue_a_request(self, start: StartCluster) -> None:
        cluster = await start(engine(0, die_after=2), failover_wait_s=0.3)
        other = await engine(1, digest="sha256:others").start()
        call = asyncio.create_task(cluster.generate(request(9)))
        await eventually(lambda: bool(cluster.engines[0].submits), "the first engine has it")
        cluster.engines.append(other)
        await cluster.control.push(other.endpoint)
        code, *_ = await refusal(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert not other.submits

    async def test_tokens_of_another_attempt_are_ignored(self, start: StartCluster) -> None:
        cluster = await start(engine(0, echo_old_attempts=True, step_s=0.01))
        answer = asyncio.create_task(cluster.generate(request(9), timeout_s=0.5))
        code, _reason, *_ = await refusal(answer)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await settled(cluster) == {"evicted_deadline": 1}


async def drained(call: Any) -> None:
    async for _ in call:
        pass


async def settled(cluster: RouterCluster) -> dict[str, int]:
    await eventually(lambda: cluster.router.server.active_requests == 0, "every request has ended")
    return await cluster.outcomes()


class TestResume:
    @pytest.mark.parametrize("known", range(13))
    async def test_a_resumed_request_returns_the_rest_exactly(self, start: StartCluster, known: int) -> None:
        cluster = await start(with_text())
        whole = await cluster.generate(request(12))
        rest = await cluster.generate(request(12, generated_token_ids=whole.token_ids[:known]))
        assert rest.token_ids == whole.token_ids[known:]
        assert rest.end.usage.generated_tokens == 12 - known
        assert rest.reason == "LENGTH"
        assert whole.text.endswith(rest.text)
        shown = len(whole.text) - len(rest.text)
        assert whole.text[:shown] == TOKENIZER.decode(whole.token_ids[:known]).removesuffix("\ufffd")[:shown]

    async def test_a_stop_in_the_known_tokens_ends_at_once(self, start: StartCluster) -> None:
        cluster = await start(with_text())
        answer = await cluster.generate(request(90, generated_token_ids=SCRIPT, sampling={"stop": ["STOP"]}))
        assert (answer.reason, answer.token_ids, answer.end.usage.generated_tokens) == ("STOP", [], 0)
        assert not cluster.engines[0].submits

    async def test_more_known_tokens_than_asked_for_is_length(self, start: StartCluster) -> None:
        cluster = await start(with_text())
        answer = await cluster.generate(request(3, generated_token_ids=[1, 2, 3, 4]))
        assert (answer.reason, answer.token_ids) == ("LENGTH", [])


class TestEnds:
    async def test_a_stop_string_cuts_and_cancels(self, start: StartCluster) -> None:
        script = scripted_token(SCRIPT)
        cluster = await start(with_text(next_token=script, vocab_size=400, step_s=0.005))
        answer = await cluster.generate(request(200, logprobs=1, sampling={"stop": ["STOP"]}))
        assert (answer.text, answer.reason) == (STOPPED, "STOP")
        assert len(answer.logprobs) == len(answer.token_ids) == answer.end.usage.generated_tokens
        await eventually(lambda: cluster.engines[0].cancels == [1], "the engine was told")

    async def test_a_stop_in_the_last_token_beats_length(self, start: StartCluster) -> None:
        ids = TOKENIZER.encode("The fox says STOP")
        cluster = await start(with_text(next_token=scripted_token(ids), tokens_per_step=50))
        answer = await cluster.generate(request(len(ids), sampling={"stop": ["STOP"]}))
        assert (answer.text, answer.reason) == ("The fox says ", "STOP")

    async def test_tokens_after_a_stop_in_one_step_are_dropped(self, start: StartCluster) -> None:
        cluster = await start(with_text(next_token=scripted_token(SCRIPT), vocab_size=400, tokens_per_step=64))
        answer = await cluster.generate(request(len(SCRIPT), sampling={"stop": ["STOP"]}))
        assert answer.text == STOPPED
        assert "now" not in TOKENIZER.decode(answer.token_ids)

    async def test_a_client_that_leaves_cancels_its_sequence(self, start: StartCluster) -> None:
        cluster = await start(engine(step_s=0.005))
        call = cluster.call(request(200))
        async for _ in call:
            break
        call.cancel()
        await eventually(lambda: cluster.engines[0].cancels == [1], "the engine was told")
        assert await settled(cluster) == {"aborted_client": 1}

    async def test_fifty_clients_that_leave_leave_nothing(self, start: StartCluster) -> None:
        cluster = await start(engine(0, step_s=0.005), engine(1, step_s=0.005))
        calls = [cluster.call(request(200)) for _ in range(50)]
        for call in calls:
            async for _ in call:
                break
        for call in calls:
            call.cancel()
        await eventually(lambda: not any(e.running for e in cluster.engines), "nothing runs")
        assert await settled(cluster) == {"aborted_client": 50}
        assert cluster.router.fleet.open_sequences == 0

    async def test_a_deadline_before_the_first_token(self, start: StartCluster) -> None:
        cluster = await start(engine(start_delay_s=5))
        code, *_ = await refusal(cluster.generate(request(9), timeout_s=0.2))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await settled(cluster) == {"evicted_deadline": 1}

    async def test_a_deadline_after_the_first_token(self, start: StartCluster) -> None:
        cluster = await start(engine(step_s=0.02))
        code, *_ = await refusal(cluster.generate(request(200), timeout_s=0.3))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await settled(cluster) == {"aborted_deadline": 1}
        assert 0 < cluster.engines[0].submits[0].deadline_s < 0.3

    @pytest.mark.parametrize(
        ("end", "code", "reason", "outcome"),
        [
            (engine_pb2.SEQUENCE_END_REJECTED_CAPACITY, "RESOURCE_EXHAUSTED", "QUEUE_FULL", "rejected_capacity"),
            (engine_pb2.SEQUENCE_END_REJECTED_INVALID, "INVALID_ARGUMENT", "INVALID", "rejected_invalid"),
            (engine_pb2.SEQUENCE_END_REJECTED_DRAINING, "UNAVAILABLE", "DRAINING", "rejected_unavailable"),
            (
                engine_pb2.SEQUENCE_END_EVICTED_DEADLINE,
                "DEADLINE_EXCEEDED",
                "DEADLINE_BEFORE_START",
                "evicted_deadline",
            ),
        ],
    )
    async def test_what_an_engine_refuses(
        self, start: StartCluster, end: engine_pb2.SequenceEnd, code: str, reason: str, outcome: str
    ) -> None:
        cluster = await start(*(engine(i, reject=end) for i in range(3)))
        got_code, got_reason, message, retry_s = await refusal(cluster.generate(request()))
        assert (got_code.name, got_reason) == (code, reason)
        assert message
        assert (retry_s is not None) == (code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"))
        assert await cluster.outcomes() == {outcome: 1}
        tried = {"QUEUE_FULL": 1 + SENT_BACK_MAX, "DRAINING": 3}.get(reason, 1)
        assert sum(len(e.submits) for e in cluster.engines) == tried

    async def test_one_full_engine_of_two_is_passed_by(self, start: StartCluster) -> None:
        full = engine_pb2.SEQUENCE_END_REJECTED_CAPACITY
        cluster = await start(engine(0, reject=full), engine(1))
        answers = [await cluster.generate(request(4)) for _ in range(8)]
        assert all(a.token_ids == expected_tokens(NEXT, PROMPT, 9, 4) for a in answers)
        assert all(a.end.usage.failovers == 0 for a in answers)

    async def test_a_failed_over_request_waits_for_a_full_engine(self, start: StartCluster) -> None:
        full = engine_pb2.SEQUENCE_END_REJECTED_CAPACITY
        cluster = await start(engine(0, die_after=3, step_s=0.02))
        busy = await engine(1, reject=full).start()
        cluster.engines.append(busy)
        call = asyncio.create_task(cluster.generate(request(9)))
        await eventually(lambda: bool(cluster.engines[0].submits), "the first engine has it")
        await cluster.control.push(cluster.engines[0].endpoint, busy.endpoint)
        await eventually(lambda: len(busy.submits) >= 2, "it asks again")
        busy.reject = engine_pb2.SEQUENCE_END_UNSPECIFIED
        assert (await call).token_ids == expected_tokens(NEXT, PROMPT, 9, 9)

    async def test_a_router_that_is_full_says_so(self, start: StartCluster) -> None:
        cluster = await start(engine(step_s=0.01), max_concurrent_requests=1)
        running = asyncio.create_task(cluster.generate(request(60)))
        await eventually(lambda: bool(cluster.engines[0].running), "one is running")
        code, reason, _, retry_s = await refusal(cluster.generate(request()))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert retry_s
        await running
        full = 'cluster_router_requests_total{model="demo",outcome="rejected_capacity"} 1.0'
        assert full in await cluster.metrics()

    async def test_unknown_models_and_bad_ids(self, start: StartCluster) -> None:
        cluster = await start(engine())
        code, reason, message, _ = await refusal(cluster.generate(request(model="other")))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "demo" in message
        code, *_ = await refusal(cluster.generate(request(request_id="a\nb")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert await cluster.outcomes() == {"rejected_invalid": 2}
        assert 'model="other"' not in await cluster.metrics()


class TestTokenize:
    async def test_a_refusal_echoes_the_id_too(self, start: StartCluster) -> None:
        cluster = await start(engine())
        call = cluster.call(inference_pb2.GenerateRequest(model="demo", request_id="mine-2"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(call)
        assert from_rpc_error(caught.value)[1] == "INVALID"
        assert ("x-request-id", "mine-2") in list(await call.trailing_metadata())

    @pytest.mark.parametrize("request_id", ["mine-3", ""])
    async def test_a_refusal_at_the_door_echoes_the_id_too(self, start: StartCluster, request_id: str) -> None:
        cluster = await start(engine(), max_concurrent_requests=1)
        cluster.engines[0].step_age_s = 0.1  # the first one stays
        first = cluster.call(request(50))
        await eventually(lambda: bool(cluster.engines[0].submits), "it is inside")
        call = cluster.call(inference_pb2.GenerateRequest(model="demo", request_id=request_id))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(call)
        assert from_rpc_error(caught.value)[1] == "QUEUE_FULL"
        echoed = dict(await call.trailing_metadata())["x-request-id"]
        assert echoed == request_id or len(echoed) == 32
        first.cancel()

    async def test_what_cannot_fit_is_refused(self, start: StartCluster) -> None:
        cluster = await start(with_text(max_model_len=20))
        chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="x" * 10_000)])
        for message in (inference_pb2.TokenizeRequest(text="x" * 10_000), inference_pb2.TokenizeRequest(chat=chat)):
            code, reason, text, _ = await refusal(cluster.stub.Tokenize(message))
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID")
            assert "shorten" in text
        assert await cluster.outcomes() == {}

    async def test_what_is_sent_compressed_is_bounded_as_it_is_read(self, start: StartCluster) -> None:
        cluster = await start(with_text())
        framing = inference_pb2.TokenizeRequest(text="x" * 2**22).ByteSize() - 2**22
        letters, long_sentence = random.Random(0).randbytes(2**18).hex(), "shorten the prompt"
        for over, compression, code, named, start_of_text in (
            (0, grpc.Compression.Gzip, grpc.StatusCode.INVALID_ARGUMENT, long_sentence, letters),
            (1, grpc.Compression.NoCompression, grpc.StatusCode.INVALID_ARGUMENT, long_sentence, letters),
            (1, grpc.Compression.Gzip, grpc.StatusCode.RESOURCE_EXHAUSTED, f"than {INFLATED_BYTES_MAX} bytes", letters),
            (0, grpc.Compression.Gzip, grpc.StatusCode.RESOURCE_EXHAUSTED, "100 times as long", ""),
            (2**20 - INFLATED_BYTES_MAX, grpc.Compression.Gzip, grpc.StatusCode.INVALID_ARGUMENT, long_sentence, ""),
        ):
            message = inference_pb2.TokenizeRequest(
                text=start_of_text + "x" * (INFLATED_BYTES_MAX - framing + over - len(start_of_text))
            )
            assert abs(message.ByteSize() - INFLATED_BYTES_MAX - over) <= 1
            refused, _, text, _ = await refusal(cluster.stub.Tokenize(message, compression=compression))
            assert refused is code
            assert named in text

    async def test_a_full_router_refuses_it_too(self, start: StartCluster) -> None:
        cluster = await start(with_text(step_s=0.01), max_concurrent_requests=1)
        running = asyncio.create_task(cluster.generate(request(60)))
        await eventually(lambda: bool(cluster.engines[0].running), "one is running")
        code, reason, _, retry_s = await refusal(cluster.stub.Tokenize(inference_pb2.TokenizeRequest(text="x")))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert retry_s
        await running

    async def test_a_bug_is_internal(self, start: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        cluster = await start(with_text())

        def broken(*_: Any, **__: Any) -> list[int]:
            raise ZeroDivisionError

        monkeypatch.setattr(Tokenizer, "encode", broken)
        code, reason, *_ = await refusal(cluster.stub.Tokenize(inference_pb2.TokenizeRequest(text="x")))
        assert (code, reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


async def health(cluster: RouterCluster, service: str = "") -> str:
    stub = health_pb2_grpc.HealthStub(cluster.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


class TestReadiness:
    async def test_nobody_there(self, start: StartCluster) -> None:
        cluster = await start()
        for service in ("", "cluster.v1.Inference"):
            assert await health(cluster, service) == "NOT_SERVING"
        code, reason, _, retry_s = await refusal(cluster.generate(request()))
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ENDPOINT")
        assert retry_s
        await refusal(cluster.generate(request(model="whatever I like")))
        assert await cluster.outcomes() == {"rejected_unavailable": 2}
        assert 'model="unknown",outcome="rejected_unavailable"} 2.0' in await cluster.metrics()

    async def test_health_follows_the_endpoints(self, start: StartCluster) -> None:
        cluster = await start(engine())
        for service in ("", "cluster.v1.Inference"):
            assert await health(cluster, service) == "SERVING"
        await cluster.engines[0].stop()
        await eventually(lambda: not cluster.router.fleet.ready, "nobody is ready")
        async with asyncio.timeout(5):
            while await health(cluster) != "NOT_SERVING":
                await asyncio.sleep(0.01)

    async def test_a_draining_endpoint_takes_nothing_new_and_finishes(self, start: StartCluster) -> None:
        cluster = await start(engine(step_s=0.01))
        running = asyncio.create_task(cluster.generate(request(40)))
        await eventually(lambda: bool(cluster.engines[0].running), "one is running")
        e = cluster.engines[0].endpoint
        draining = Endpoint(e.incarnation, e.address, e.checkpoint_digest, e.block_size, draining=True)
        await cluster.control.push(draining)
        await eventually(lambda: not cluster.router.fleet.ready, "nobody is ready")
        code, *_ = await refusal(cluster.generate(request()))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert len((await running).token_ids) == 40

    async def test_another_identity_is_refused(self, start: StartCluster) -> None:
        cluster = await start(engine(0, claimed_generation=7), engine(1))
        await cluster.generate(request())
        assert not cluster.engines[0].submits
        assert cluster.engines[0].sessions == 0

    async def test_reflection_names_the_services(self, start: StartCluster) -> None:
        from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

        cluster = await start()
        stub = reflection_pb2_grpc.ServerReflectionStub(cluster.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {"cluster.v1.Inference", "grpc.health.v1.Health"} <= names
        call.cancel()
