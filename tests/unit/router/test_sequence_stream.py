"""One sequence's way back: order, bounds, and what a failure leaves."""

import asyncio
import gc
from typing import Any

import psutil
import pytest

from cluster.router.sequence_stream import LossReason, SequenceLost, SequenceStream
from cluster.v1 import engine_pb2, inference_pb2


def update(
    *token_ids: int, end: engine_pb2.SequenceEnd = engine_pb2.SEQUENCE_END_UNSPECIFIED, attempt: int = 1, **fields: Any
) -> engine_pb2.SequenceUpdate:
    return engine_pb2.SequenceUpdate(token_ids=token_ids, end=end, attempt=attempt, **fields)


async def received(stream: SequenceStream) -> list[int]:
    return (await stream.receive()).token_ids


async def test_updates_come_in_order_all_at_once() -> None:
    stream = SequenceStream(9, attempt=1)
    stream.deliver(update(1, 2))
    stream.deliver(update(3))
    assert await received(stream) == [1, 2, 3]
    stream.deliver(update(4))
    assert await received(stream) == [4]


async def test_who_waits_is_woken() -> None:
    stream = SequenceStream(9, attempt=1)
    waiting = asyncio.create_task(received(stream))
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.deliver(update(1))
    stream.deliver(update(2))
    assert await asyncio.wait_for(waiting, 1) == [1, 2]


async def test_a_failure_comes_after_what_was_delivered_and_the_first_one_counts() -> None:
    stream = SequenceStream(9, attempt=1)
    stream.deliver(update(1))
    stream.fail(SequenceLost(LossReason.SILENT))
    stream.fail(SequenceLost(LossReason.REMOVED))
    assert await received(stream) == [1]
    for _ in range(2):
        with pytest.raises(SequenceLost) as lost:
            await stream.receive()
        assert lost.value.reason is LossReason.SILENT


async def test_a_failure_wakes_who_waits() -> None:
    stream = SequenceStream(9, attempt=1)
    waiting = asyncio.create_task(received(stream))
    await asyncio.sleep(0)
    stream.fail(SequenceLost(LossReason.BROKEN))
    with pytest.raises(SequenceLost):
        await asyncio.wait_for(waiting, 1)


async def test_after_an_overflow_nothing_is_taken_any_more() -> None:
    stream = SequenceStream(2, attempt=1)
    for token in (1, 2, 3):  # the third is one too many
        stream.deliver(update(token))
    assert await received(stream) == [1, 2]
    stream.deliver(update(4))  # there would be room, and a gap
    with pytest.raises(SequenceLost) as lost:
        await stream.receive()
    assert lost.value.reason is LossReason.OVERFLOW


async def test_the_engines_last_word_is_known_even_when_it_is_not_taken() -> None:
    stream = SequenceStream(2, attempt=1)
    stream.fail(SequenceLost(LossReason.BROKEN))
    assert not stream.ended
    stream.deliver(update(end=engine_pb2.SEQUENCE_END_LENGTH))
    assert stream.ended


async def test_a_receiver_that_leaves_loses_nothing_for_the_next() -> None:
    stream = SequenceStream(9, attempt=1)
    leaving = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    stream.deliver(update(1))
    assert await received(stream) == [1]


async def test_news_that_nobody_takes_grow_together() -> None:
    stream = SequenceStream(9, attempt=1)
    logprobs = [inference_pb2.TokenLogprobs(token_id=token) for token in (1, 2, 3)]
    stream.deliver(update(1, logprobs=logprobs[:1], cached_prompt_tokens=32))
    stream.deliver(update(2, 3, logprobs=logprobs[1:]))
    stream.deliver(update(end=engine_pb2.SEQUENCE_END_REJECTED_INVALID, detail="no"))
    news = await stream.receive()
    assert (news.token_ids, news.logprobs) == ([1, 2, 3], logprobs)
    assert (news.end, news.detail, news.cached_prompt_tokens) == (engine_pb2.SEQUENCE_END_REJECTED_INVALID, "no", 32)


async def test_logprobs_that_nobody_takes_are_no_part_of_their_step() -> None:
    stream = SequenceStream(9, attempt=1)
    top = [inference_pb2.TopLogprob(token_id=3, logprob=-2.0)]
    delivered = update(1, logprobs=[inference_pb2.TokenLogprobs(token_id=1, logprob=-1.0, top=top)])
    stream.deliver(delivered)
    delivered.logprobs[0].logprob = delivered.logprobs[0].top[0].logprob = 7.0
    (kept,) = (await stream.receive()).logprobs
    assert kept == inference_pb2.TokenLogprobs(token_id=1, logprob=-1.0, top=top)


async def test_logprobs_that_nobody_takes_keep_nothing_else_of_their_step_in_memory() -> None:
    ours = update(1, logprobs=[inference_pb2.TokenLogprobs(token_id=1, logprob=-1.0)])
    others = update(2, attempt=2, detail="x" * 2**18)
    response = engine_pb2.SessionResponse(step=engine_pb2.StepUpdate(step=1, sequences=[ours, others]))
    raw = response.SerializeToString()
    stream = SequenceStream(400, attempt=1)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(400):  # 100 MiB
        for each in engine_pb2.SessionResponse.FromString(raw).step.sequences:
            stream.deliver(each)
    assert psutil.Process().memory_info().rss - before < 20 * 2**20
    news = await stream.receive()
    assert len(news.token_ids) == len(news.logprobs) == 400


async def test_other_attempts_and_what_follows_the_end_are_ignored() -> None:
    stream = SequenceStream(9, attempt=2)
    stream.deliver(update(1, attempt=1))
    stream.deliver(update(2, attempt=2, end=engine_pb2.SEQUENCE_END_LENGTH))
    stream.deliver(update(3, attempt=2))
    assert await received(stream) == [2]


async def test_taking_makes_room_for_as_many_updates_again() -> None:
    stream = SequenceStream(2, attempt=1)
    for token in range(0, 10, 2):
        stream.deliver(update(token))
        stream.deliver(update(token + 1))
        assert await received(stream) == [token, token + 1]
