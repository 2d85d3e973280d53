"""The token that Ray's nodes show each other: one file per run directory, for its owner's eyes only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cluster.domain.errors import ConfigError

MIN_TOKEN_LENGTH = 16


def token_path(run_dir: Path) -> Path:
    return run_dir / "ray" / "token"


def make_or_take(token_file: Path | None, run_dir: Path) -> None:
    """For a head: the token of ``token_file``, or one of its own that is kept as long as its run directory."""
    if token_file is not None:
        _require_good(read_token(token_file), token_file)
        _copy_token(token_file, run_dir)
        return
    path = token_path(run_dir)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        _write_private(path, secrets.token_hex(32))


def take_token(token_file: Path | None, run_dir: Path, address: str) -> str:
    """The token to join ``address`` with: of ``token_file``, which is copied, or the one that is here already."""
    if token_file is not None:
        _copy_token(token_file, run_dir)
    if token_path(run_dir).exists():
        return read_token(token_path(run_dir))
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    raise ConfigError(
        f"Joining {address} needs the head's token: copy its ray/token file here and name it with --token-file."
    )


def read_token(source: Path) -> str:
    try:
        token = source.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"The token file {source} cannot be read ({why}); copy it from the head.") from error
    if not token:
        raise ConfigError(f"The token file {source} is empty; put the head's token into it.")
    return token


def _require_good(token: str, source: Path) -> None:
    """Who knows it owns every process of the cluster."""
    if len(token) < MIN_TOKEN_LENGTH or any(c.isspace() or not c.isprintable() for c in token):
        raise ConfigError(
            f"The token in {source} is no good: give at least {MIN_TOKEN_LENGTH} characters without spaces, "
            "for example from 'openssl rand -hex 32'."
        )


def _copy_token(source: Path, run_dir: Path) -> None:
    token = read_token(source)
    path = token_path(run_dir)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.samefile(source):
        return
    path.unlink(missing_ok=True)
    _write_private(path, token)


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
