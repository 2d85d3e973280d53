"""``llm-cluster explain``: why something is decided as it is, without doing it."""

from __future__ import annotations

import enum
import json
import sys
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from cluster.cli import options
from cluster.cli.addresses import parse_addresses
from cluster.cli.status import plain, wide_console
from cluster.client.routing import explain_route
from cluster.config.schema import ROUTER_ADDRESS
from cluster.v1 import routing_pb2

# As long as one of these keeps it out, nobody waits for an endpoint.
_LASTING = frozenset({"serves_model", "session_up", "not_draining", "same_checkpoint"})
_SOUND = frozenset({"not_ejected", "not_slow"})


class Explained(enum.StrEnum):
    """What can be explained."""

    ROUTE = "route"


def explain_command(
    what: Annotated[Explained, typer.Argument(help="route: which replica PROMPT would go to.")],  # noqa: ARG001
    prompt: Annotated[str, typer.Argument(help="The text of a request; - reads it from standard input.")],
    address: Annotated[str, typer.Option(help="HOST:PORT of a router; several, separated by commas.")] = ROUTER_ADDRESS,
    model: Annotated[str, typer.Option(help="Served model name; default: the only one.")] = "",
    session_id: options.SessionId = "",
    cache_salt: Annotated[str, typer.Option(help="Keeps tenants' caches apart.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Show every endpoint, every filter's verdict and every score; nothing is sent to a replica."""
    text = sys.stdin.read() if prompt == "-" else prompt
    explanation = explain_route(
        text, parse_addresses(address), model=model, session_id=session_id, cache_salt=cache_salt
    )
    if as_json:
        print(json.dumps(plain(explanation), indent=2))
        return
    console = wide_console()
    console.print(render_route(explanation))
    console.print(_verdict(explanation))


def render_route(explanation: routing_pb2.RouteExplanation) -> Table:
    """One row for each endpoint, in the order in which the policy looks at them.

    Scores of those that are kept out stand in brackets: what they would be if nobody were.
    """
    scorers = list(dict.fromkeys(score.name for row in explanation.endpoints for score in row.scores))
    table = Table(box=box.SIMPLE_HEAD, title=f"policy {explanation.policy}, model {explanation.model}")
    table.add_column("replica")
    for name in ("cached", "queued", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("standing")
    table.add_column("kept out by")
    for name in scorers:
        table.add_column(name, justify="right")
    table.add_column("total", justify="right")
    table.add_column("")
    for row in explanation.endpoints:
        scores = {score.name: _counts(f"{score.weight:g} x {score.score:.3f}", row) for score in row.scores}
        table.add_row(
            f"{row.replica}#{row.generation}",
            str(row.cached_tokens),
            str(row.queued_tokens),
            str(row.tokens),
            row.standing.lower(),
            ", ".join(_reasons(row)) or "-",
            *(scores.get(name, "-") for name in scorers),
            _counts(f"{row.total:.3f}", row),
            "<- taken" if row.taken else "" if row.looked_at else "not looked at",
            style="bold" if row.taken else None,
        )
    return table


def _counts(number: str, row: routing_pb2.EndpointVerdict) -> str:
    """In brackets where the endpoint is kept out, so that its score has no say."""
    return number if row.qualifies else f"({number})"


def _reasons(row: routing_pb2.EndpointVerdict) -> list[str]:
    """The filters that it does not pass; those in brackets step aside for this request when nobody would be left."""
    return [rule.name if rule.required else f"({rule.name})" for rule in row.filters if not rule.passes]


def _verdict(explanation: routing_pb2.RouteExplanation) -> str:
    taken = next((row for row in explanation.endpoints if row.taken), None)
    if taken is not None:
        return _where(explanation.prompt_tokens, taken)
    prompt = f"A prompt of {explanation.prompt_tokens} tokens"
    if not explanation.prompt_tokens:
        prompt = "The prompt, which counts 0 tokens as no replica of the model is up to say how it is tokenized,"
    rows = explanation.endpoints
    if not any(_LASTING.isdisjoint(rule.name for rule in row.filters if not rule.passes) for row in rows):
        return f"{prompt} would be refused: no endpoint takes new requests."
    if any(rule.required and rule.name in _SOUND for row in rows for rule in row.filters):
        return f"{prompt} would wait: a sound endpoint, full for now, is better than one that is slow or ejected."
    return f"{prompt} would wait: no endpoint takes it now."


def _where(prompt_tokens: int, taken: routing_pb2.EndpointVerdict) -> str:
    return (
        f"A prompt of {prompt_tokens} tokens would go to {taken.replica}, "
        f"which has {taken.cached_tokens} of them cached and {taken.queued_tokens} others to compute first."
    )
