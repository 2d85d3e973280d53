"""Generated files are what their generators write today."""

from __future__ import annotations

from ops.generators.__main__ import generated, outdated


def test_every_generated_file_is_up_to_date():
    assert outdated(generated()) == [], "run ops/generate"
