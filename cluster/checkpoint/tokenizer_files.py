"""Do the tokenizer's files work (adapter: tokenizers, jinja2)? Routers find out too late."""

from __future__ import annotations

from pathlib import Path

from cluster.domain.errors import CheckpointError


def check_tokenizer(file: Path) -> None:
    """CheckpointError when ``file`` is no tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # boundary: tokenizers raises bare Exception
        raise CheckpointError(
            f"{file} is no tokenizer ({error}); save the tokenizer again with save_pretrained, or delete the file."
        ) from error


def check_template(file: Path, template: str) -> None:
    """CheckpointError when the chat template in ``file`` is no jinja."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = str
    try:
        environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"{file}: the chat template has an error in line {error.lineno}: {error.message}."
        ) from error
