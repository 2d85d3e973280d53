"""What is made of what foreign clients say; the clients themselves are not there in tests."""

import sys

import pytest

from ops.interop import __main__ as interop

DUE = '{"due":["answer","stream"]}\n'
ANSWER = '{"case":"answer","error":null}\n'


def told(text: str, status: int = 0) -> dict[str, str | None]:
    return dict(interop.told(interop.Output(text, status)))


def test_each_case_is_told_with_its_error_and_other_lines_are_none() -> None:
    output = f'{DUE}a warning\n{ANSWER}[1]\n{{"case":"stream","error":"text: \\"a\\" in place of b"}}\n'
    assert told(output) == {"answer": None, "stream": 'text: "a" in place of b'}


def test_a_case_that_was_due_and_never_told_of_has_failed() -> None:
    found = told(DUE + ANSWER + '{"case":"stream","er', status=1)
    assert found["answer"] is None
    assert "never told of" in str(found["stream"])


def test_a_client_that_ends_badly_after_all_its_cases_has_failed() -> None:
    stream = '{"case":"stream","error":null}\n'
    assert told(DUE + ANSWER + stream) == {"answer": None, "stream": None}
    assert "exit status 7" in str(told(DUE + ANSWER + stream + "panic", status=7)["end"])


@pytest.mark.parametrize("output", ["", "panic: nothing works"])
def test_a_client_that_tells_of_no_case_has_failed(output: str) -> None:
    assert "never told of" in str(told(output)["all"])


def test_without_any_client_nothing_was_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["check"])
    assert interop.main() == 2
    assert "README.md" in capsys.readouterr().err
