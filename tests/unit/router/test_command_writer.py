"""What leaves for an engine: all of it, in order, however little the engine takes at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router.command_writer import WAITING_MAX, CommandWriter
from cluster.v1 import engine_pb2


class FakeCall:
    """An engine that has room for ``room`` messages, and says when it has more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.on_room: Callable[[], None] | None = None
        self.sent: list[engine_pb2.SessionRequest] = []

    @property
    def writable(self) -> bool:
        return self.room > 0

    def push(self, message: engine_pb2.SessionRequest) -> None:
        assert self.writable
        self.sent.append(message)
        self.room -= 1

    def make_room(self, room: int) -> None:
        was, self.room = self.room, self.room + room
        if was == 0 and self.on_room is not None:
            self.on_room()

    @property
    def submitted(self) -> list[int]:
        return [submit.sequence_id for message in self.sent for submit in message.commands.submits]

    @property
    def cancelled(self) -> list[int]:
        return [cancel.sequence_id for message in self.sent for cancel in message.commands.cancels]


def submit(number: int, tokens: int = 1) -> engine_pb2.Submit:
    return engine_pb2.Submit(sequence_id=number, prompt_token_ids=[1] * tokens)


def pauses(load_s: float = 1.0) -> engine_pb2.SessionRequest:
    return engine_pb2.SessionRequest(pauses=engine_pb2.Pauses(load_s=load_s))


async def turn() -> None:
    await asyncio.sleep(0)


async def test_what_is_said_in_one_turn_leaves_in_one_message() -> None:
    writer, call = CommandWriter(), FakeCall(10)
    writer.begin(call)
    writer.submit(submit(1))
    writer.submit(submit(2))
    writer.cancel(9)
    assert not call.sent
    await turn()
    assert (len(call.sent), call.submitted, call.cancelled) == (1, [1, 2], [9])


async def test_what_is_said_while_there_is_no_room_leaves_behind_what_waits_for_it() -> None:
    """Room comes once: whoever takes only what was gathered before it would leave the rest for ever."""
    writer, call = CommandWriter(), FakeCall(1)
    writer.begin(call)
    writer.submit(submit(1))
    writer.say("pauses", pauses())
    await turn()
    assert len(call.sent) == 1
    writer.submit(submit(2))
    await turn()
    call.make_room(10)
    assert call.submitted == [1, 2]
    assert [message.WhichOneof("message") for message in call.sent] == ["commands", "pauses", "commands"]


async def test_a_submit_is_taken_back_for_as_long_as_it_has_not_left() -> None:
    writer, call = CommandWriter(), FakeCall(0)
    writer.begin(call)
    writer.submit(submit(1))
    assert writer.take_back(1)
    assert not writer.take_back(1)
    writer.submit(submit(2))
    call.make_room(1)
    assert not writer.take_back(2)
    assert call.submitted == [2]


async def test_of_each_kind_beside_commands_the_last_counts() -> None:
    writer, call = CommandWriter(), FakeCall(9)
    writer.say("pauses", pauses(1.0))
    writer.say("pauses", pauses(2.0))
    writer.begin(call)
    await turn()
    assert [message.pauses.load_s for message in call.sent] == [2.0]


async def test_a_stream_that_ends_takes_what_was_on_its_way_with_it_and_the_next_one_goes_on() -> None:
    writer, old, new = CommandWriter(), FakeCall(1), FakeCall(9)
    writer.begin(old)
    writer.submit(submit(1))
    writer.say("pauses", pauses())
    await turn()
    writer.end()
    writer.submit(submit(2))
    writer.forget_commands()
    writer.submit(submit(3))
    old.make_room(9)
    await turn()
    assert old.submitted == [1]
    writer.begin(new)
    await turn()
    assert new.submitted == [3]
    assert len(new.sent) == 1, "what the old stream was to hear is nothing to the new one"


async def test_it_says_when_it_is_full() -> None:
    writer = CommandWriter()
    for number in range(WAITING_MAX):
        assert not writer.full
        writer.submit(submit(number))
    assert writer.full


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(1, 40)),
            st.tuples(st.just("cancel"), st.integers(1, 40)),
            st.tuples(st.just("say"), st.sampled_from(("pauses", "resync"))),
            st.tuples(st.just("room"), st.integers(1, 3)),
            st.tuples(st.just("turn"), st.none()),
        ),
        max_size=60,
    ),
    bytes_max=st.sampled_from((1, 60, 2**20)),
)
@settings(deadline=None)
def test_all_of_it_leaves_in_order_once_there_is_room(steps: list[tuple[str, object]], bytes_max: int) -> None:
    async def run() -> None:
        writer, call = CommandWriter(bytes_max), FakeCall(0)
        writer.begin(call)
        submitted, cancelled, said = [], [], set()
        for kind, what in steps:
            if kind == "submit":
                assert isinstance(what, int)
                submitted.append(len(submitted) + 1)
                writer.submit(submit(submitted[-1], what))
            elif kind == "cancel":
                assert isinstance(what, int)
                cancelled.append(what)
                writer.cancel(what)
            elif kind == "say":
                said.add(what)
                writer.say(str(what), pauses() if what == "pauses" else engine_pb2.SessionRequest())
            elif kind == "room":
                assert isinstance(what, int)
                call.make_room(what)
            else:
                await turn()
        await turn()
        call.make_room(1000)
        await turn()
        assert (call.submitted, call.cancelled) == (submitted, cancelled)
        assert sum(message.HasField("pauses") for message in call.sent) >= ("pauses" in said)
        sizes = [sum(s.ByteSize() for s in m.commands.submits) for m in call.sent if len(m.commands.submits) > 1]
        assert all(size <= bytes_max for size in sizes)

    asyncio.run(run())
