"""`llm-cluster chat`: a conversation, line by line, from a terminal or a pipe."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from typing import Annotated

import typer

from cluster.cli import options
from cluster.cli.addresses import parse_addresses
from cluster.cli.generate import usage_line
from cluster.client import Chunk, Client, Completion
from cluster.client.requests import Options
from cluster.config.schema import ROUTER_ADDRESS
from cluster.domain.errors import ClusterError

EXIT_WORDS = ("/exit", "/quit")


def chat_command(
    address: Annotated[str, typer.Option(help="HOST:PORT of a router; several, separated by commas.")] = ROUTER_ADDRESS,
    model: Annotated[str, typer.Option(help="Served model name; default: the only one.")] = "",
    system: Annotated[str, typer.Option(help="A first message that sets the tone.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of each answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed draws the same tokens.")] = None,
    priority: options.Priority = 0,
    tenant: options.Tenant = "",
    session_id: Annotated[str, typer.Option(help="Names the conversation; default: a new id for each.")] = "",
) -> None:
    """Talk to a model: one line is one message, /new starts over, /exit ends."""
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    sampling = Options(**{name: value for name, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    interactive = sys.stdin.isatty()
    opening = [{"role": "system", "content": system}] if system else []
    history, conversation = list(opening), session_id or uuid.uuid4().hex
    with Client(*parse_addresses(address)) as client:
        while (line := _next_line(interactive=interactive)) is not None:
            if line == "/new":
                history, conversation = list(opening), session_id or uuid.uuid4().hex
            elif line:
                history.append({"role": "user", "content": line})
                try:
                    events = client.generate(
                        history, model=model, priority=priority, tenant=tenant, session_id=conversation, **sampling
                    )
                    answer = _answer(events, interactive=interactive)
                except ClusterError as error:
                    if not interactive:
                        raise
                    history.pop()
                    print(error, file=sys.stderr)
                    continue
                history.append({"role": "assistant", "content": answer.text})


def _next_line(*, interactive: bool) -> str | None:
    """What the user says next; None at the end."""
    if interactive:
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    stripped = line.strip()
    return None if not line or stripped in EXIT_WORDS else stripped


def _answer(events: Iterator[Chunk | Completion], *, interactive: bool) -> Completion:
    completion: Completion | None = None
    for event in events:
        if isinstance(event, Completion):
            completion = event
        else:
            print(event.text, end="", flush=True)
    assert completion is not None, "a stream ends with its Completion"
    print(flush=True)
    if interactive:
        print(f"[{usage_line(completion)}]", file=sys.stderr)
    return completion
