"""How calls enter and leave the router, without a network: labels, bounds, ends."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from cluster.config.schema import RouterConfig
from cluster.domain.clock import MonotonicClock
from cluster.domain.endpoint import EndpointTable
from cluster.router.fleet import Fleet
from cluster.router.forwarding import Ended, Progress, RequestRun
from cluster.router.server import InferenceServer
from cluster.router.session import ServedModel, SessionSettings
from cluster.router.surroundings import Surroundings
from cluster.router.tokenization import Tokenizer
from cluster.router.tokenizer_cache import TokenizerCache
from cluster.telemetry.logs import get_logger
from cluster.telemetry.metrics import RouterMetrics
from cluster.v1 import engine_pb2, inference_pb2
from tests.contract import small_tokenizers

TOKENIZER = Tokenizer(small_tokenizers.files(small_tokenizers.byte_level()))
CARD = engine_pb2.ModelCard(name="demo", max_model_len=64, vocab_size=340, checkpoint_digest="sha256:a")
CHAT = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="fox?")])


class AbortError(Exception):
    """As grpc.aio ends a call."""


class Context:
    """A client's side of one call; one that is ``stalled`` takes no message and no status."""

    def __init__(self, *, stalled: bool = False) -> None:
        self.stalled = stalled
        self.status: grpc.Status | None = None
        self.written: list[Any] = []

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def send_initial_metadata(self, _metadata: Any) -> None: ...

    def set_trailing_metadata(self, _metadata: Any) -> None: ...

    async def write(self, message: Any) -> None:
        if self.stalled:
            await asyncio.Event().wait()
        self.written.append(message)

    async def abort_with_status(self, status: grpc.Status) -> None:
        if self.stalled:
            await asyncio.Event().wait()
        self.status = status
        raise AbortError


class Router:
    def __init__(self, **config: Any) -> None:
        self.registry = CollectorRegistry()
        self.tokenizers = TokenizerCache()
        self.fleet = Fleet(SessionSettings("r", 1.0, 1.0, self.tokenizers), get_logger(), lambda: None)
        self.around = Surroundings(self.fleet, RouterConfig(**config), RouterMetrics(self.registry), MonotonicClock())
        self.server = InferenceServer(self.around, self.tokenizers, get_logger())

    def know(self, *models: str) -> None:
        self.fleet.apply(EndpointTable(1, models=models))

    def serve(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer | None = TOKENIZER) -> None:
        self.know("demo")
        monkeypatch.setattr(Fleet, "served", lambda *_: ServedModel(CARD, tokenizer))

    async def refused(self, method: str, message: Any) -> grpc.Status:
        context = Context()
        with pytest.raises(AbortError):
            await getattr(self.server, method)(message, context)
        assert context.status is not None
        return context.status

    def outcomes(self) -> dict[tuple[str, str], int]:
        (family,) = [f for f in self.registry.collect() if f.name == "cluster_router_requests"]
        totals = [s for s in family.samples if s.name.endswith("_total")]
        return {(s.labels["model"], s.labels["outcome"]): int(s.value) for s in totals}


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    ids = inference_pb2.TokenIds(ids=[1, 2])
    return inference_pb2.GenerateRequest(**{"token_ids": ids, **fields})


@pytest.mark.parametrize(
    ("known", "asked", "label"),
    [
        ((), "whatever", "unknown"),
        ((), "", "unknown"),
        (("demo",), "", "demo"),
        (("demo",), "demo", "demo"),
        (("demo",), "Demo", "unknown"),
        (("a", "b"), "", "unknown"),
        (("a", "b"), "b", "b"),
    ],
)
async def test_labels_are_names_of_known_models_only(known: tuple[str, ...], asked: str, label: str) -> None:
    router = Router()
    router.know(*known)
    await router.refused("Generate", request(model=asked))
    assert [model for model, _ in router.outcomes()] == [label]


async def test_what_is_refused_at_the_door_is_counted_under_its_model() -> None:
    router = Router()
    router.know("demo")
    await router.server.drain(0.0)
    for asked in ("demo", "", "other"):
        assert (await router.refused("Generate", request(model=asked))).code is grpc.StatusCode.UNAVAILABLE
    assert router.outcomes() == {("demo", "rejected_unavailable"): 2, ("unknown", "rejected_unavailable"): 1}


async def test_tokenize_is_admitted_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    router.serve(monkeypatch)
    answer = await router.server.Tokenize(inference_pb2.TokenizeRequest(chat=CHAT), Context())
    assert list(answer.ids) == TOKENIZER.encode(TOKENIZER.render_chat([{"role": "user", "content": "fox?"}]))
    await router.server.drain(0.0)
    status = await router.refused("Tokenize", inference_pb2.TokenizeRequest(text="x"))
    assert status.code is grpc.StatusCode.UNAVAILABLE
    assert router.outcomes() == {}
    router.tokenizers.close()


@pytest.mark.parametrize("prompt", [{"text": "x"}, {"chat": CHAT}])
async def test_prompts_wait_for_their_turn_as_their_tenants(
    monkeypatch: pytest.MonkeyPatch, prompt: dict[str, Any]
) -> None:
    router = Router()
    router.serve(monkeypatch)
    context, tenants = Context(), []

    async def encode(*_: Any, tenant: str, **__: Any) -> list[int]:
        tenants.append(tenant)
        return [1]

    for name in ("encode", "encode_chat"):
        monkeypatch.setattr(TokenizerCache, name, encode)
    monkeypatch.setattr(context, "invocation_metadata", lambda: (("x-tenant", "acme"),))
    await router.server.Tokenize(inference_pb2.TokenizeRequest(**prompt), context)
    await router.server.ExplainRoute(inference_pb2.GenerateRequest(**prompt), context)
    assert tenants == ["acme", "acme"]
    router.tokenizers.close()


async def test_draining_waits_for_a_tokenize(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    router.serve(monkeypatch)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def slow(*_: Any, **__: Any) -> list[int]:
        entered.set()
        await go_on.wait()
        return [1]

    monkeypatch.setattr(TokenizerCache, "encode", slow)
    call = asyncio.create_task(router.server.Tokenize(inference_pb2.TokenizeRequest(text="x"), Context()))
    await asyncio.wait_for(entered.wait(), 1)
    draining = asyncio.create_task(router.server.drain(5.0))
    await asyncio.sleep(0)
    assert (router.server.active_requests, draining.done()) == (1, False)
    go_on.set()
    await asyncio.wait_for(draining, 1)
    assert list((await call).ids) == [1]


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (inference_pb2.TokenizeRequest(), "nothing to tokenize"),
        (inference_pb2.TokenizeRequest(chat=inference_pb2.Chat()), "no messages"),
        (inference_pb2.TokenizeRequest(text="x" * 100_000), "shorten"),
        (
            inference_pb2.TokenizeRequest(
                chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="x" * 100_000)])
            ),
            "shorten",
        ),
    ],
)
async def test_tokenize_refuses_before_it_works(
    monkeypatch: pytest.MonkeyPatch, message: inference_pb2.TokenizeRequest, names: str
) -> None:
    router = Router()
    router.serve(monkeypatch)
    monkeypatch.setattr(Tokenizer, "render_chat", lambda *_: pytest.fail("it was rendered"))
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    status = await router.refused("Tokenize", message)
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    assert names in status.details


@pytest.mark.parametrize("method", ["Tokenize", "Generate", "Complete"])
async def test_a_bug_is_internal(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    router = Router()
    router.serve(monkeypatch)

    def broken(*_: Any, **__: Any) -> list[int]:
        raise ZeroDivisionError

    monkeypatch.setattr(Tokenizer, "encode", broken)
    message = inference_pb2.TokenizeRequest(text="x") if method == "Tokenize" else request(text="x", token_ids=None)
    assert (await router.refused(method, message)).code is grpc.StatusCode.INTERNAL
    assert router.server.active_requests == 0
    assert router.outcomes() == ({} if method == "Tokenize" else {("demo", "failed_internal"): 1})


def run_that_emits(texts: int) -> Callable[..., Any]:
    async def run(_self: RequestRun, emit: Callable[[Progress], Any], _deadline_s: float | None) -> Ended:
        for _ in range(texts):
            await emit(Progress("text", (), ()))
        return Ended(inference_pb2.FINISH_REASON_LENGTH, inference_pb2.Usage())

    return run


async def test_chunks_and_the_end_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    router.serve(monkeypatch)
    monkeypatch.setattr(RequestRun, "run", run_that_emits(2))
    context = Context()
    await router.server.Generate(request(), context)
    assert [m.WhichOneof("event") for m in context.written] == ["chunk", "chunk", "end"]
    assert router.outcomes() == {("demo", "completed"): 1}


@pytest.mark.parametrize("texts", [0, 1])
async def test_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch, texts: int) -> None:
    router = Router(client_stall_s=0.02)
    router.serve(monkeypatch)
    monkeypatch.setattr(RequestRun, "run", run_that_emits(texts))
    told: list[dict[str, Any]] = []
    router.server._log = get_logger().bind()
    monkeypatch.setattr(router.server._log, "warning", lambda event, **facts: told.append({"event": event, **facts}))
    call = asyncio.create_task(router.server.Generate(request(request_id="mine"), Context(stalled=True)))
    await asyncio.wait([call], timeout=2)
    assert call.cancelled()
    assert told == [{"event": "client_stalled", "request_id": "mine", "model": "demo"}]
    assert router.server.active_requests == 0
    assert list(router.outcomes()) == [("demo", "aborted_client")]


async def test_draining_ends_a_request_that_waits_for_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(client_stall_s=30.0)
    router.serve(monkeypatch)
    monkeypatch.setattr(RequestRun, "run", run_that_emits(1))
    writing = asyncio.Event()
    context = Context(stalled=True)

    async def write(_message: Any) -> None:
        writing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(context, "write", write)
    call = asyncio.create_task(router.server.Generate(request(), context))
    await asyncio.wait_for(writing.wait(), 2)
    await asyncio.wait_for(router.server.drain(0.0), 0.9)  # not the second that it gives to those who do not end
    await asyncio.wait([call], timeout=2)
    assert (router.server.active_requests, router.outcomes()) == (0, {("demo", "rejected_unavailable"): 1})


@pytest.mark.parametrize(("drained", "outcome"), [(False, "aborted_client"), (True, "rejected_unavailable")])
async def test_what_the_end_of_the_drain_cuts_off_was_not_left_by_its_client(
    monkeypatch: pytest.MonkeyPatch, drained: bool, outcome: str
) -> None:
    router = Router()
    router.serve(monkeypatch)
    entered = asyncio.Event()

    async def run(_self: RequestRun, _emit: Any, _deadline_s: float | None) -> Ended:
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(RequestRun, "run", run)
    call = asyncio.create_task(router.server.Generate(request(), Context()))
    await asyncio.wait_for(entered.wait(), 2)
    if drained:
        monkeypatch.setattr("cluster.router.server.DRAIN_MARGIN_S", 0.0)
        await router.server.drain(0.0)
    call.cancel()
    await asyncio.wait([call], timeout=2)
    assert router.outcomes() == {("demo", outcome): 1}


def value(router: Router, name: str, model: str = "demo") -> float:
    return router.registry.get_sample_value(f"cluster_router_{name}", {"model": model}) or 0.0


@pytest.mark.parametrize(("objective_s", "good"), [(5.0, 1), (1e-9, 0)])
async def test_a_completed_request_counts_as_good_when_it_was_quick(
    monkeypatch: pytest.MonkeyPatch, objective_s: float, good: int
) -> None:
    router = Router(ttft_objective_s=objective_s)
    router.serve(monkeypatch)
    monkeypatch.setattr(RequestRun, "run", run_that_emits(1))
    await router.server.Generate(request(), Context())
    assert router.outcomes() == {("demo", "completed"): 1}
    assert value(router, "goodput_requests_total") == good


async def test_a_request_runs_from_when_it_is_valid_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    router.serve(monkeypatch)
    seen: list[float] = []

    async def run(_self: RequestRun, _emit: Any, _deadline_s: float | None) -> Ended:
        seen.append(value(router, "requests_running"))
        return Ended(inference_pb2.FINISH_REASON_LENGTH, inference_pb2.Usage())

    monkeypatch.setattr(RequestRun, "run", run)
    await router.server.Generate(request(), Context())
    await router.refused("Generate", request(model="other", token_ids=None))
    assert (seen, value(router, "requests_running"), value(router, "requests_running", "unknown")) == ([1.0], 0.0, 0.0)
