"""Which models there are, and what a request's model name means."""

import pytest

from cluster.domain.endpoint import EndpointTable
from cluster.domain.errors import ModelNotFound, RejectReason, RequestRejected
from cluster.router.fleet import Fleet
from cluster.router.session import SessionSettings
from cluster.router.tokenizer_cache import TokenizerCache
from cluster.telemetry.logs import get_logger


def fleet(*models: str) -> Fleet:
    made = Fleet(SessionSettings("r", 1.0, 1.0, TokenizerCache()), get_logger(), lambda: None)
    if models:
        assert made.apply(EndpointTable(5, models=models, state_id="a"))
    return made


@pytest.mark.parametrize(
    ("models", "asked", "meant"),
    [
        ((), "", None),
        ((), "x", None),
        (("demo",), "", "demo"),
        (("demo",), "demo", "demo"),
        (("demo",), "x", None),
        (("b", "a"), "", None),
        (("b", "a"), "a", "a"),
    ],
)
def test_what_a_name_means(models: tuple[str, ...], asked: str, meant: str | None) -> None:
    assert fleet(*models).resolve(asked) == meant


def test_what_is_not_served_is_said_in_one_sentence() -> None:
    with pytest.raises(RequestRejected, match="No model is served yet"):
        fleet().served("x")
    with pytest.raises(ModelNotFound, match="'x'; served are: a, b"):
        fleet("b", "a").served("x")
    with pytest.raises(ModelNotFound, match="must name one"):
        fleet("b", "a").served("")
    with pytest.raises(RequestRejected, match="No replica of model demo is ready") as caught:
        fleet("demo").served("")
    assert caught.value.reject_reason is RejectReason.NO_ENDPOINT


def test_an_older_table_is_ignored_unless_the_controller_began_anew() -> None:
    known = fleet("demo")
    assert not known.apply(EndpointTable(4, models=("old",), state_id="a"))
    assert (known.epoch, known.models) == (5, ("demo",))
    assert known.apply(EndpointTable(1, models=("new",), state_id="b"))
    assert (known.epoch, known.models) == (1, ("new",))


async def test_a_change_wakes_who_waits_and_forgets_who_left() -> None:
    known, heard = fleet("demo"), []
    known._on_change = lambda: heard.append(1)
    waiting, leaving = known.change(), known.change()
    leaving.cancel()
    known.apply(EndpointTable(6, models=("demo",), state_id="a"))
    assert (waiting.done(), leaving.cancelled(), heard) == (True, True, [1])
