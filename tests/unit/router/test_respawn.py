"""When a process that died is started again, and what it is told."""

from cluster.config.schema import RouterConfig
from cluster.router.process_order import ProcessAnswer, ProcessOrder
from cluster.router.respawn import PAUSE_MAX_S, SILENT_ROUNDS, STABLE_S, Respawn, Silence


def test_pauses_double_up_to_a_bound_and_begin_anew_after_a_long_life() -> None:
    respawn = Respawn()
    assert [respawn.pause_after_s(1.0) for _ in range(5)] == [0.0, 0.25, 0.5, 1.0, 2.0]
    assert max(respawn.pause_after_s(1.0) for _ in range(10_000)) == PAUSE_MAX_S
    assert respawn.pause_after_s(STABLE_S) == 0.0
    assert respawn.pause_after_s(1.0) == 0.25


def test_silence_is_too_long_after_rounds_in_a_row() -> None:
    silence = Silence()
    assert not any(silence.asked(answered=False) for _ in range(SILENT_ROUNDS - 1))
    assert not silence.asked(answered=True)
    assert [silence.asked(answered=False) for _ in range(SILENT_ROUNDS)] == [False] * (SILENT_ROUNDS - 1) + [True]


def test_orders_and_answers_survive_the_way() -> None:
    order = ProcessOrder(RouterConfig(port=7, processes=3, tpot_objective_s=0.7), "host:1", 2, 5.0, "/a b", "/c")
    assert ProcessOrder.from_line(order.to_line()) == order
    assert order.to_line().count(b"\n") == 1
    answer = ProcessAnswer(4, {"grpc": 5}, "no\nway")
    assert ProcessAnswer.from_line(answer.to_line().encode()) == answer
    assert ProcessAnswer.from_line(b"") is None
    assert ProcessAnswer.from_line(b'{"pid": 4') is None
