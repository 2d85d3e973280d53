from __future__ import annotations

import io
import threading

from cluster.telemetry.log_copy import MOST_BYTES, LogCopy, copied_logs


def append(file, text: str) -> None:
    with file.open("a") as stream:
        stream.write(text)


def test_whole_lines_that_are_new(tmp_path):
    old, out = tmp_path / "controller.log", io.StringIO()
    append(old, "before\n")
    copy = LogCopy(tmp_path, out)
    append(old, "one\ntw")
    append(tmp_path / "rank-0.log", "rank\n")
    append(tmp_path / "ray-start.log", "not ours\n")
    append(tmp_path / "router.err", "nor this\n")
    assert copy.look() == len("one\nrank\n")
    assert out.getvalue() == "one\nrank\n"
    append(old, "o\n")
    copy.look()
    assert out.getvalue() == "one\nrank\ntwo\n"
    assert copy.look() == 0


def test_a_file_that_was_written_anew_or_removed(tmp_path):
    file, out = tmp_path / "a.log", io.StringIO()
    append(file, "a long first line\n")
    copy = LogCopy(tmp_path, out)
    file.write_text("new\n")
    copy.look()
    file.unlink()
    assert copy.look() == 0
    assert out.getvalue() == "new\n"


def test_a_look_is_bounded_and_nothing_is_lost(tmp_path):
    file, out = tmp_path / "a.log", io.StringIO()
    copy = LogCopy(tmp_path, out)
    text = "x" * 999 + "\n"
    append(file, text * (MOST_BYTES // 1000 + 5))
    first = copy.look()
    assert 0 < first <= MOST_BYTES
    while copy.look():
        pass
    assert out.getvalue() == text * (MOST_BYTES // 1000 + 5)


def test_a_line_without_an_end_holds_nothing_up(tmp_path):
    file, out = tmp_path / "a.log", io.StringIO()
    copy = LogCopy(tmp_path, out)
    append(file, "x" * (MOST_BYTES + 10) + "\nnext\n")
    while copy.look():
        pass
    assert out.getvalue().endswith("x\nnext\n")


def test_followed_while_it_grows_and_to_its_end(tmp_path):
    file, seen = tmp_path / "a.log", threading.Event()

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            seen.set()
            return super().write(text)

    out = Out()
    with copied_logs(tmp_path, out):
        append(file, "one\n")
        assert seen.wait(5)
        append(file, "last words\n")
    assert out.getvalue() == "one\nlast words\n"
