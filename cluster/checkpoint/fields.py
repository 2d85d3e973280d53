"""Typed access to the fields of a config.json, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.domain.errors import CheckpointError

# No size in a published config comes near it; a larger one would only make arithmetic slow.
_MAX_SIZE = 2**40


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one config; absent ones take the default that the caller names."""

    config: Mapping[str, Any]

    def get(self, key: str) -> Any:
        return self.config.get(key)

    def whole(self, key: str, default: int, *, least: int = 1, absent_is_none: bool = False) -> int:
        """A whole number of at least ``least``; ``absent_is_none``: null means the default too."""
        value = self.config.get(key, default)
        if value is None and absent_is_none:
            return default
        if type(value) is not int or not least <= value <= _MAX_SIZE:
            raise CheckpointError(f"config.json: {key} is {value!r}; it must be a whole number of at least {least}.")
        return value

    def optional_whole(self, key: str, default: int | None) -> int | None:
        """A positive number, or None when the config says null."""
        value = self.config.get(key, default)
        return None if value is None else self.whole(key, 1) if key in self.config else default

    def flag(self, key: str, default: bool) -> bool:  # noqa: FBT001 - a default, not a switch
        value = self.config.get(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {value!r}; it must be true or false.")
        return value

    def head_dim(self, hidden: int, heads: int, default: int | None) -> int:
        """An explicit head_dim, else the family's ``default``, else hidden_size / num_attention_heads."""
        if self.config.get("head_dim") is not None:
            return self.whole("head_dim", 1)
        if default is not None:
            return default
        if hidden % heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}; add head_dim."
            )
        return hidden // heads

    def rope(self) -> Mapping[str, Any]:
        """Rope parameters under their new name or their old one; empty when the config has none."""
        for key in ("rope_parameters", "rope_scaling"):
            value = self.config.get(key)
            if isinstance(value, Mapping):
                return value
        return {}
