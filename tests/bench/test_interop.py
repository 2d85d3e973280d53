"""What is made of what foreign clients say; the clients themselves are not there in tests."""

import sys

import pytest

from ops.interop import __main__ as interop


def test_each_case_is_told_with_its_error_and_other_lines_are_none() -> None:
    output = 'a warning\n{"case":"answer","error":null}\n{"case":"stream","error":"text: \\"a\\" in place of b"}\n'
    assert list(interop.told(output)) == [("answer", None), ("stream", 'text: "a" in place of b')]


@pytest.mark.parametrize("output", ["", "panic: nothing works"])
def test_a_client_that_tells_of_no_case_has_failed(output: str) -> None:
    [(case, error)] = interop.told(output)
    assert case == "all"
    assert error


def test_without_any_client_nothing_was_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["check"])
    assert interop.main() == 2
    assert "README.md" in capsys.readouterr().err
