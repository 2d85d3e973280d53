"""Keeps a cluster's models as its config file says, while both may change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.config.reload import change_between, content_digest
from cluster.config.schema import ClusterConfig, ModelConfig
from cluster.domain.errors import ClusterError, ConfigError, NoFeasiblePlan

Apply = Callable[[tuple[ModelConfig, ...]], None]


class ConfigFollower:
    """Applies ``config``'s models, then those of every later content of ``file`` (None: there will be none).

    ``load`` reads the whole configuration again, ``apply`` raises what keeps it from taking effect, ``say`` is told
    once about everything that is not as the file says. Models that do not fit yet are tried again at every step.
    A content is read when two steps in a row find it, so that nobody acts on half a file.
    """

    def __init__(
        self,
        config: ClusterConfig,
        file: Path | None,
        load: Callable[[], ClusterConfig],
        apply: Apply,
        say: Callable[[str], None],
    ) -> None:
        self._running, self._file, self._load, self._apply, self._say = config, file, load, apply, say
        self._digest = ""  # of what was read last: ``config`` may be older than the file is now
        self._seen = content_digest(file) if file else ""
        self._wanted = config.models
        # A config without models says nothing about those that an operator applied.
        self._pending: tuple[ModelConfig, ...] | None = config.models or None
        self._first = True
        self._said = ""

    def step(self) -> None:
        """Looks once, acts once. ConfigError for the models that it was made with: nothing runs yet then."""
        self._look()
        if self._pending is not None:
            self._try(self._pending)

    def _look(self) -> None:
        digest = content_digest(self._file) if self._file else ""
        settled, self._seen = digest == self._seen, digest
        if digest == self._digest or not settled:  # it may still be being written
            return
        self._digest = digest
        try:
            new = self._load()
        except ConfigError as error:
            self._tell(f"The changed config is refused, nothing is changed: {error}")
            return
        change = change_between(self._wanted, self._running, new)
        if change.needs_restart:
            self._tell(f"Changed in the config, needs a restart: {', '.join(change.needs_restart)}.")
        if change.models is not None:
            self._wanted = self._pending = change.models
            self._first = False

    def _try(self, models: tuple[ModelConfig, ...]) -> None:
        try:
            self._apply(models)
        except NoFeasiblePlan as error:
            self._tell(f"Waiting for nodes: {error}")
        except ConfigError as error:
            if self._first:
                raise
            self._pending = None
            self._tell(f"The changed config is refused, nothing is changed: {error}")
        except ClusterError as error:
            self._tell(f"The config's models are not applied yet: {error}")
        else:
            self._pending, self._first, self._said = None, False, ""
            served = ", ".join(f"{model.name} x {model.replicas}" for model in models) or "nothing"
            self._say(f"Applied the config's models: {served}.")

    def _tell(self, what: str) -> None:
        if what != self._said:
            self._say(what)
        self._said = what
