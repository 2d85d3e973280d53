"""What a client keeps, asks again, and calls its errors."""

import random
from typing import Any

import grpc
import pytest

from cluster.client import AsyncClient, Client
from cluster.client.address_memory import AddressMemory
from cluster.client.requests import build_request, build_tokenize_request, error_of_call, never_ready, typed_error
from cluster.client.resume_budget import ResumeBudget
from cluster.client.transcript import BACKOFF_MAX_S, RESUMES_MAX, Transcript, flat_addresses
from cluster.config.schema import RouterConfig
from cluster.domain.errors import (
    ClusterError,
    ConfigError,
    EngineFailed,
    ModelNotFound,
    RejectReason,
    RequestAborted,
    RequestEvicted,
    RequestRejected,
)
from cluster.v1 import inference_pb2
from cluster.wire.status import CallFailure


class NoChance(random.Random):
    """Backoffs are as long as they can be, and nothing is added to what others ask for."""

    def random(self) -> float:
        return 0.0


def transcript(*addresses: str, resumes_max: int = 2, **shared: Any) -> Transcript:
    request = build_request([1, 2], {"max_tokens": 9}, cache_salt="tenant")
    t = Transcript(request, addresses or ("a",), resumes_max, **{"rng": NoChance(), **shared})
    t.next_address(0.0)
    return t


def started(*addresses: str, resumes_max: int = 2, **shared: Any) -> Transcript:
    t = transcript(*addresses, resumes_max=resumes_max, **shared)
    t.take(chunk(5))
    return t


def broke(
    t: Transcript, code: str = "UNAVAILABLE", retry_after_s: float | None = None, reason: str = "", now_s: float = 0.0
) -> float | None:
    """The pause before the next call, which then begins; None when there is none."""
    try:
        pause_s = t.pause_after_s((grpc.StatusCode[code], reason, "no", retry_after_s), now_s)
    except ClusterError:
        return None
    t.next_address(now_s + pause_s)
    return pause_s


def chunk(*ids: int, text: str = "") -> inference_pb2.Chunk:
    return inference_pb2.Chunk(text=text, token_ids=ids)


def test_a_resumed_request_tells_what_is_known() -> None:
    t = transcript("a", "b")
    assert list(t.next_request().generated_token_ids) == []
    t.take(chunk(5, text="x"))
    t.take(chunk(6, 7, text="y"))
    assert t.address == "a"
    assert broke(t) == 0.0
    assert t.address == "b"
    assert list(t.next_request().generated_token_ids) == [5, 6, 7]
    assert t.next_request().cache_salt == "tenant"
    t.take(chunk(8, text="z"))
    usage = inference_pb2.Usage(prompt_tokens=2, generated_tokens=1, seed=4)
    whole = t.finish(inference_pb2.End(finish_reason=inference_pb2.FINISH_REASON_STOP, usage=usage))
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("xyz", (5, 6, 7, 8), "stop")
    assert (whole.usage.generated_tokens, whole.usage.resumes, whole.usage.seed) == (4, 1, 4)


def test_tokens_given_by_the_caller_are_not_given_back() -> None:
    t = Transcript(build_request([1], {}, generated_token_ids=[8, 9]), ("a",), 2)
    t.take(chunk(5))
    assert t.finish(inference_pb2.End()).token_ids == (5,)
    assert broke(t)
    assert list(t.next_request().generated_token_ids) == [8, 9, 5]


def test_resumes_are_bounded_and_start_again_with_progress() -> None:
    t = started()
    assert [broke(t), broke(t), broke(t)] == [0.1, 0.2, None]
    t = started()
    assert [broke(t), broke(t)] == [0.1, 0.2]
    t.take(chunk(6))
    assert [broke(t), broke(t), broke(t)] == [0.1, 0.2, None]


@pytest.mark.parametrize("addresses", [("a",), ("a", "b", "c")])
def test_the_pauses_cover_the_restart_of_a_router(addresses: tuple[str, ...]) -> None:
    totals = []
    for seed in range(50):
        t = started(*addresses, resumes_max=RESUMES_MAX, rng=random.Random(seed))
        pauses = [broke(t) or 0.0 for _ in range(RESUMES_MAX)]
        assert max(pauses) <= BACKOFF_MAX_S
        assert broke(t) is None
        totals.append(sum(pauses))
    assert min(totals) > 13
    assert sum(totals) / len(totals) > 15


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "INTERNAL", "CANCELLED"])
def test_what_another_call_would_not_change_is_not_tried_again(code: str) -> None:
    assert broke(started("a", "b"), code) is None


def test_a_full_router_ends_a_request_only_before_its_start() -> None:
    assert broke(transcript("a", "b"), "RESOURCE_EXHAUSTED", 1.0, "QUEUE_FULL") is None
    assert broke(started("a"), "RESOURCE_EXHAUSTED", 1.0, "QUEUE_FULL") == 1.0


def test_nobody_comes_back_before_the_time_that_the_router_says() -> None:
    pauses = [broke(started("a", rng=random.Random(seed)), "RESOURCE_EXHAUSTED", 10.0) or 0.0 for seed in range(50)]
    assert min(pauses) >= 10.0
    assert max(pauses) <= 15.0
    assert len(set(pauses)) > 40
    assert broke(started("a"), "UNAVAILABLE", 0.01) == 0.1, "its own backoff holds as well"


def test_each_router_says_its_own_time() -> None:
    t = started("a", "b", resumes_max=9)
    assert broke(t, "RESOURCE_EXHAUSTED", 10.0, now_s=0.0) == 0.0
    assert t.address == "b"
    assert broke(t, "UNAVAILABLE", now_s=1.0) == 0.2
    assert t.address == "b", "the other one is full until 10"
    t.take(chunk(6))
    assert broke(t, "UNAVAILABLE", now_s=2.0) == 0.1
    assert t.address == "b"
    assert broke(t, "UNAVAILABLE", 20.0, now_s=3.0) == 7.0, "until the first of them lets us come"
    assert t.address == "a"


def test_pauses_are_spread_by_chance() -> None:
    pauses = [broke(started("a", rng=random.Random(seed))) or 0.0 for seed in range(50)]
    assert len(set(pauses)) > 40
    assert min(pauses) >= 0.05
    assert max(pauses) <= 0.1


def test_a_used_up_budget_lengthens_the_pauses_of_streams_and_ends_none() -> None:
    budget = ResumeBudget(reserve=5, calls_per_s=2.0, wait_max_s=4.0)
    many = [started(budget=budget) for _ in range(20)]
    assert [broke(t) for t in many] == [0.1] * 20, "every one may go on once"
    pauses = [broke(t) for t in many]
    assert pauses[:5] == [0.2] * 5
    assert pauses[5:13] == [pytest.approx(0.2 + n / 2) for n in range(1, 9)]
    assert pauses[13:] == [4.2] * 7
    assert budget.wait_s(1.0) == pytest.approx(3.5), "time goes by"


def test_a_used_up_budget_ends_what_has_not_started_behind_its_first_retry() -> None:
    budget = ResumeBudget(reserve=1)
    first, second = (transcript(budget=budget, resumes_max=9) for _ in range(2))
    assert [broke(first), broke(first), broke(first)] == [0.0, 0.2, None]
    assert [broke(second), broke(second)] == [0.0, None]


def test_addresses_that_a_request_has_not_tried_cost_nothing() -> None:
    budget = ResumeBudget(reserve=1)
    for t in (transcript("a", "b", "c", budget=budget), started("a", "b", "c", budget=budget)):
        assert [broke(t), broke(t)] == [0.0, 0.0]
    assert budget.spend(0.0), "the one call is still there"


def test_nor_does_one_that_lets_it_come_again() -> None:
    budget = ResumeBudget(reserve=2, calls_per_s=1e-9)
    t = started("a", "b", resumes_max=9, budget=budget)
    assert broke(t, "RESOURCE_EXHAUSTED", 10.0) == 0.0
    t.take(chunk(6))
    assert [broke(t, now_s=1.0), broke(t, now_s=2.0)] == [0.1, 0.2]
    assert broke(t, now_s=10.0) == 0.0
    assert t.address == "a"
    assert [budget.spend(10.0), budget.spend(10.0)] == [True, False], "only the one before was paid for"


def test_with_progress_every_address_is_worth_a_free_try_again() -> None:
    budget = ResumeBudget(reserve=2, calls_per_s=1e-9)
    t = started("a", "b", resumes_max=9, budget=budget)
    assert [broke(t), broke(t), broke(t)] == [0.0, 0.2, 0.4]
    t.take(chunk(6))
    assert [broke(t), broke(t)] == [0.0, 0.2]
    assert budget.spend(0.0), "only the third one was paid for"


def test_an_address_that_was_not_tried_comes_before_one_that_was() -> None:
    memory = AddressMemory()
    t = started("a", "b", memory=memory)
    assert t.pause_after_s(None, 1.0) == 0.0
    memory.failed("b", "UNAVAILABLE", "", 2.0)
    memory.answered("a")
    assert t.next_address(2.0) == "b", "it was promised another one without a pause"


def test_a_request_begins_where_one_was_answered() -> None:
    memory = AddressMemory()
    t = transcript("a", "b", "c", memory=memory)
    assert [t.address, broke(t), t.address, broke(t), t.address] == ["a", 0.0, "b", 0.0, "c"]
    t.take(chunk(5))
    assert [transcript("a", "b", "c", memory=memory).address for _ in range(3)] == ["c"] * 3
    later = transcript("c", "b", "a", memory=memory)
    later.take(chunk(5))
    assert (broke(later), later.address) == (0.0, "b"), (
        "what was not tried comes first, the longest ago asked before others"
    )


def test_a_stream_goes_on_where_another_was_answered_meanwhile() -> None:
    memory = AddressMemory()
    t = started("a", "b", "c", memory=memory, resumes_max=9)
    assert [broke(t), broke(t)] == [0.0, 0.0]
    other = transcript("b", memory=memory)
    other.finish(inference_pb2.End())
    assert broke(t) == pytest.approx(0.4)
    assert t.address == "b"


def test_addresses_in_vain_take_turns() -> None:
    t = started("a", "b", resumes_max=9, memory=AddressMemory(away_s=0.0))
    asked = [t.address]
    for _ in range(4):
        broke(t, "UNAVAILABLE", None, "NO_ENDPOINT")
        asked.append(t.address)
    assert asked == ["a", "b", "a", "b", "a"]


def test_text_that_came_is_told_too_unless_some_came_before_us() -> None:
    t = transcript("a")
    assert t.next_request().received_characters == 0
    t.take(chunk(5, text="äb"))
    t.take(chunk(text="c"))
    assert t.next_request().received_characters == 3
    t = Transcript(build_request([1], {}, generated_token_ids=[8, 9]), ("a",))
    t.take(chunk(5, text="x"))
    assert t.next_request().received_characters == 0
    t = Transcript(build_request([1], {}, generated_token_ids=[8, 9], received_characters=4), ("a",))
    assert t.next_request().received_characters == 4
    t.take(chunk(5, text="x"))
    assert t.next_request().received_characters == 5


def test_what_the_tokens_were_computed_with_is_told_again() -> None:
    t = transcript("a")
    assert t.next_request().checkpoint_digest == ""
    told = [
        t.take(inference_pb2.Chunk(token_ids=[5], checkpoint_digest="sha256:a")),
        t.take(inference_pb2.Chunk(token_ids=[6])),
    ]
    assert t.next_request().checkpoint_digest == "sha256:a"
    assert {chunk.checkpoint_digest for chunk in told} == {"sha256:a"}


def test_who_goes_on_by_hand_says_what_the_tokens_were_computed_with() -> None:
    t = Transcript(build_request([1], {}, generated_token_ids=[8], checkpoint_digest="sha256:a"), ("a",))
    assert t.next_request().checkpoint_digest == "sha256:a"
    t.take(chunk(5))
    assert t.next_request().checkpoint_digest == "sha256:a"


def test_addresses_come_one_by_one_or_in_lists() -> None:
    assert flat_addresses(["a:1", ["b:2", "c:3"]]) == ("a:1", "b:2", "c:3")
    assert flat_addresses([]) == ()
    with pytest.raises(ConfigError, match="at least one"):
        flat_addresses([[]])
    assert Client(["a:1", "b:2"])._addresses == AsyncClient("a:1", "b:2")._addresses == ("a:1", "b:2")


def test_what_no_router_has_refused_is_tried_again_before_it_has_started() -> None:
    """Several processes, or a balancer, may have the one address."""
    t = transcript("a", resumes_max=RESUMES_MAX)
    assert [broke(t) for _ in range(4)] == [0.0, 0.2, 0.4, None]
    t = transcript("a", "b", "c", resumes_max=RESUMES_MAX)
    assert [broke(t) for _ in range(6)] == [0.0, 0.0, 0.1, 0.2, 0.4, None]
    assert broke(transcript("a", resumes_max=0)) is None


@pytest.mark.parametrize("reason", ["NO_ENDPOINT", "DRAINING", "REPLICA_FAILED"])
def test_what_a_router_refuses_is_tried_once_on_each_before_it_has_started(reason: str) -> None:
    t = transcript("a", "b", "c", resumes_max=RESUMES_MAX)
    assert [broke(t, "UNAVAILABLE", 1.0, reason) for _ in range(3)] == [0.0, 0.0, None]
    assert broke(transcript("a"), "UNAVAILABLE", 1.0, reason) is None
    t = transcript("a")
    assert [broke(t), broke(t, "UNAVAILABLE", 1.0, reason)] == [0.0, None]


def test_prompts_of_every_kind() -> None:
    assert build_request("hi", {}).text == "hi"
    assert list(build_request((3, 4), {}).token_ids.ids) == [3, 4]
    chat = build_request([{"role": "user", "content": "x"}], {}).chat
    assert [(m.role, m.content) for m in chat.messages] == [("user", "x")]
    with pytest.raises(RequestRejected, match="not both"):
        build_request([1, {"role": "user", "content": "x"}], {})


def test_sampling_gets_a_seed_and_defaults_stay_defaults() -> None:
    assert not build_request("x", {}).HasField("sampling")
    assert not build_request("x", {"max_tokens": 3}).sampling.HasField("seed")
    sampled = build_request("x", {"temperature": 1.0, "stop": "END"})
    assert sampled.sampling.HasField("seed")
    assert list(sampled.sampling.stop) == ["END"]
    assert build_request("x", {"temperature": 1.0, "seed": 0}).sampling.seed == 0
    assert sampled.request_id != build_request("x", {}).request_id


@pytest.mark.parametrize("prompt", [5, [-1], [1.5], [2**32], [{"role": "user", "content": 3}], None])
def test_what_is_no_prompt_is_named(prompt: Any) -> None:
    with pytest.raises(RequestRejected, match="A prompt is a text"):
        build_request(prompt, {})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": -1}, "max_tokens cannot be -1"),
        ({"temperature": "hot"}, "temperature cannot be 'hot'"),
        ({"stop": [3]}, "stop cannot be"),
        ({"maximum": 3}, "no option 'maximum'; the options for sampling are max_tokens"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: Any, says: str) -> None:
    with pytest.raises(RequestRejected, match=says):
        build_request("x", options)


@pytest.mark.parametrize("argument", [{"priority": "high"}, {"logprobs": -1}, {"generated_token_ids": [-1]}])
def test_an_argument_that_cannot_be_is_refused(argument: Any) -> None:
    with pytest.raises(RequestRejected, match="wrong value"):
        build_request("x", {}, **argument)


def test_a_deadline_that_only_grpc_has_noticed_says_what_to_do() -> None:
    error = typed_error("DEADLINE_EXCEEDED", "", "Deadline Exceeded", None, "host:1", started=False)
    assert str(error) == "The deadline came before an answer from host:1; allow the request more time."


@pytest.mark.parametrize(
    ("code", "reason", "started", "expected"),
    [
        ("INVALID_ARGUMENT", "INVALID", False, RequestRejected(RejectReason.INVALID, "m")),
        ("NOT_FOUND", "MODEL_NOT_FOUND", False, ModelNotFound("m")),
        ("RESOURCE_EXHAUSTED", "QUEUE_FULL", False, RequestRejected(RejectReason.QUEUE_FULL, "m")),
        ("UNAVAILABLE", "NO_ENDPOINT", False, RequestRejected(RejectReason.NO_ENDPOINT, "m")),
        ("UNAVAILABLE", "DRAINING", True, RequestRejected(RejectReason.DRAINING, "m")),
        ("UNAVAILABLE", "REPLICA_FAILED", True, EngineFailed("m", retryable=True)),
        ("UNAVAILABLE", "", True, RequestRejected(RejectReason.NO_ENDPOINT, "m")),
        ("DEADLINE_EXCEEDED", "", False, RequestEvicted("m")),
        ("UNIMPLEMENTED", "", False, ConfigError("m")),
        ("INTERNAL", "INTERNAL", True, EngineFailed("m", retryable=False)),
    ],
)
def test_errors_have_types(code: str, reason: str, started: bool, expected: ClusterError) -> None:
    error = typed_error(code, reason, "m", None, "host:1", started=started)
    assert (type(error), error.reason) == (type(expected), expected.reason)


def test_a_deadline_after_the_start_is_an_abort() -> None:
    assert isinstance(typed_error("DEADLINE_EXCEEDED", "", "", None, "a", started=True), RequestAborted)
    assert isinstance(typed_error("CANCELLED", "", "", None, "a", started=True), RequestAborted)


def failure(code: grpc.StatusCode, reason: str = "", message: str = "no") -> CallFailure:
    return code, reason, message, None


def test_a_call_that_broke_is_followed_by_another_or_is_the_error() -> None:
    t = started("a", "b")
    assert t.pause_after_s(failure(grpc.StatusCode.UNAVAILABLE), 0.0) == 0.0
    assert (t.next_address(0.0), t.resumes) == ("b", 1)
    assert t.pause_after_s(None, 0.0) == pytest.approx(0.2)  # a stream without its End
    assert t.next_address(0.2) == "a"
    with pytest.raises(RequestRejected, match="No router answers at a"):
        t.pause_after_s(None, 0.2)


def test_what_no_other_router_would_change_is_raised_at_once() -> None:
    with pytest.raises(RequestRejected, match="too long") as caught:
        transcript("a", "b").pause_after_s(failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID", "too long"), 0.0)
    assert caught.value.reject_reason is RejectReason.INVALID


def test_what_is_to_be_tokenized() -> None:
    text = build_tokenize_request("fox", "demo", add_special_tokens=True)
    assert (text.model, text.text, text.add_special_tokens) == ("demo", "fox", True)
    chat = build_tokenize_request([{"role": "user", "content": "x"}], "", add_special_tokens=False)
    assert [m.content for m in chat.chat.messages] == ["x"]


def test_errors_of_single_calls() -> None:
    error = error_of_call(failure(grpc.StatusCode.UNIMPLEMENTED), "host:1")
    assert isinstance(error, ConfigError)
    assert "host:1" in str(error)
    assert str(never_ready("host:1", 2.5)) == "No model was ready at host:1 within 2.5 s."


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_clients_look_where_a_router_listens_by_default(client: type[Client | AsyncClient]) -> None:
    assert client()._addresses == (f"127.0.0.1:{RouterConfig().port}",)
