"""Every setting, its value, and where the value came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from cluster.config.load import LoadedConfig, dotted

DEFAULT_SOURCE = "default"


@dataclass(frozen=True, slots=True)
class ExplainedSetting:
    """One row: dotted path, the value in use, and file:line, variable, flag or "default"."""

    path: str
    value: object
    source: str


def explain(loaded: LoadedConfig) -> tuple[ExplainedSetting, ...]:
    """One row for each setting, in the schema's order."""
    return tuple(
        ExplainedSetting(path, value, loaded.sources.get(path, DEFAULT_SOURCE))
        for path, value in _values(loaded.config, ())
    )


def _values(section: BaseModel, prefix: tuple[str | int, ...]) -> Iterator[tuple[str, object]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        path = (*prefix, name)
        if isinstance(value, BaseModel):
            yield from _values(value, path)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                yield from _values(item, (*path, index))
        else:
            yield dotted(path), value
