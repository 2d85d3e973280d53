"""`generate` and `chat` against a router on real sockets, from the command line's own code."""

import asyncio
import io
import json
from collections.abc import AsyncIterator

import pytest
from typer.testing import CliRunner

from cluster.cli.chat import chat_command
from cluster.cli.generate import generate_command
from cluster.client import Client
from cluster.domain.errors import ConfigError, RequestRejected
from tests.contract import small_tokenizers
from tests.contract.fake_engine import FakeEngine, scripted_token
from tests.contract.router_cluster import RouterCluster

pytestmark = pytest.mark.integration
BACKEND = small_tokenizers.byte_level()
SCRIPT = BACKEND.encode("the 👩 answer").ids


@pytest.fixture
async def cluster() -> AsyncIterator[RouterCluster]:
    files = small_tokenizers.files(BACKEND)
    engine = FakeEngine(scripted_token(SCRIPT), tokenizer_files=files, vocab_size=400)
    cluster = await RouterCluster().start(engine)
    yield cluster
    await cluster.close()


async def run(command, *arguments: str, stdin: str = ""):
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(command)
    return await asyncio.to_thread(CliRunner().invoke, app, arguments, input=stdin)


LENGTH = ("--max-tokens", str(len(SCRIPT)))


async def test_generate_streams_text_and_says_what_it_took(cluster: RouterCluster) -> None:
    cluster.injected += 1
    result = await run(generate_command, "fox", "--address", cluster.address, *LENGTH, "--seed", "4")
    assert result.exit_code == 0, result.output
    assert result.stdout == "the 👩 answer\n"
    assert f"{len(SCRIPT)} generated tokens, length, seed 4" in result.stderr


async def test_generate_prints_json(cluster: RouterCluster) -> None:
    cluster.injected += 1
    result = await run(
        generate_command, "-", "--address", cluster.address, *LENGTH, "--stop", "swer", "--json", stdin="fox"
    )
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["finish_reason"]) == ("the 👩 an", "stop")
    assert answer["usage"]["prompt_tokens"] == len(BACKEND.encode("fox").ids)


@pytest.mark.parametrize("address", ["nowhere", "host:port", "a:70000", ""])
async def test_a_bad_address_is_one_sentence(address: str) -> None:
    result = await run(generate_command, "fox", "--address", address)
    assert isinstance(result.exception, ConfigError)
    assert "HOST:PORT" in str(result.exception)


async def test_generate_says_who_asks_and_how_urgent_it_is(cluster: RouterCluster) -> None:
    cluster.injected += 2
    callers = cluster.watch_callers()
    arguments = ("fox", "--address", cluster.address, *LENGTH)
    named = await run(generate_command, *arguments, "--priority", "-3", "--tenant", "acme", "--session-id", "talk 7")
    assert named.exit_code == 0, named.output
    assert (await run(generate_command, *arguments)).exit_code == 0
    assert callers == [("acme", "talk 7"), ("", "")]
    assert [submit.priority for submit in cluster.engines[0].submits] == [-3, 0]


@pytest.mark.parametrize("bad", ["t" * 65, "é"])
async def test_a_bad_tenant_is_one_sentence(cluster: RouterCluster, bad: str) -> None:
    cluster.injected += bad.isascii()
    result = await run(generate_command, "fox", "--address", cluster.address, "--tenant", bad)
    assert isinstance(result.exception, RequestRejected)
    assert str(result.exception).startswith("x-tenant must be ")


async def test_each_conversation_of_a_chat_has_its_id(cluster: RouterCluster) -> None:
    cluster.injected += 5
    callers = cluster.watch_callers()
    arguments = ("--address", cluster.address, *LENGTH, "--tenant", "acme", "--priority", "2")
    assert (await run(chat_command, *arguments, stdin="a\nb\n/new\nc\n")).exit_code == 0
    assert {tenant for tenant, _ in callers} == {"acme"}
    first, again, second = (session_id for _, session_id in callers)
    assert first == again
    assert "" not in {first, second}
    assert first != second
    callers.clear()
    assert (await run(chat_command, *arguments, "--session-id", "mine", stdin="a\n/new\nb\n")).exit_code == 0
    assert callers == [("acme", "mine")] * 2
    assert [submit.priority for submit in cluster.engines[0].submits] == [2] * 5


async def test_chat_remembers_the_conversation(cluster: RouterCluster) -> None:
    cluster.injected += 2
    result = await run(chat_command, "--address", cluster.address, *LENGTH, stdin="fox?\n\nlater\n/new\n/exit\nnever\n")
    assert result.stdout == "the 👩 answer\n" * 2
    prompts = [BACKEND.decode(list(s.prompt_token_ids)) for s in cluster.engines[0].submits]
    assert prompts[1] == "<|user|>fox?\n<|assistant|>the 👩 answer\n<|user|>later\n<|assistant|>"


async def test_the_blocking_client_resumes_too(cluster: RouterCluster) -> None:
    def talk() -> tuple[str, list[int], list[str]]:
        with Client("127.0.0.1:1", cluster.address) as client:
            client_of_one = Client(cluster.address)
            client_of_one.wait_ready(5)
            ids = client_of_one.tokenize("fox")
            models = [m.name for m in client_of_one.list_models()]
            client_of_one.close()
            text = io.StringIO()
            for event in client.generate("fox", max_tokens=len(SCRIPT), tenant="acme", session_id="talk"):
                if not hasattr(event, "usage"):
                    text.write(event.text)
            return text.getvalue(), ids, models

    cluster.injected += 1
    callers = cluster.watch_callers()
    assert await asyncio.to_thread(talk) == ("the 👩 answer", BACKEND.encode("fox").ids, ["demo"])
    assert callers[-1] == ("acme", "talk")
