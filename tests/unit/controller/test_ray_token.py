from __future__ import annotations

import pytest

from cluster.controller import ray_start
from cluster.controller.ray_token import MIN_TOKEN_LENGTH, make_or_take, take_token, token_path
from cluster.domain.errors import ConfigError

GOOD = "0123456789abcdef"


def test_a_token_is_made_once_and_private(tmp_path):
    make_or_take(None, tmp_path)
    token = token_path(tmp_path)
    text = token.read_text()
    make_or_take(None, tmp_path)
    assert token.read_text() == text
    assert len(text) == 64
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_head_takes_the_token_it_is_given_whatever_it_had(tmp_path):
    make_or_take(None, tmp_path)
    given = tmp_path / "given"
    given.write_text(f" {GOOD}\n")
    make_or_take(given, tmp_path)
    assert token_path(tmp_path).read_text() == GOOD
    assert token_path(tmp_path).stat().st_mode & 0o777 == 0o600
    make_or_take(token_path(tmp_path), tmp_path)  # its own is as good as any
    assert token_path(tmp_path).read_text() == GOOD


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "it is no text"),
        (GOOD[:-1].encode(), f"at least {MIN_TOKEN_LENGTH} characters"),
        (b"two words, and long enough", "without spaces"),
    ],
)
def test_a_token_that_is_none_is_refused_in_one_sentence(tmp_path, text, why):
    given = tmp_path / "given"
    if text is not None:
        given.write_bytes(text)
    with pytest.raises(ConfigError, match=why) as caught:
        make_or_take(given, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(given) in str(caught.value)
    assert not token_path(tmp_path).exists()


def test_joining_needs_the_heads_token(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="--token-file"):
        ray_start.start_worker("10.0.0.1:6379", tmp_path, host="127.0.0.1")
    with pytest.raises(ConfigError, match="cannot be read"):
        ray_start.start_worker("10.0.0.1:6379", tmp_path, host="10.0.0.2", token_file=tmp_path / "none")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the environment")
    assert take_token(None, tmp_path, "10.0.0.1:6379") == "of the environment"
    given = tmp_path / "given"
    given.write_text(GOOD)
    assert take_token(given, tmp_path, "10.0.0.1:6379") == GOOD
    assert take_token(None, tmp_path, "10.0.0.1:6379") == GOOD
