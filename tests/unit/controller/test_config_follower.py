from __future__ import annotations

import pytest

from cluster.config.schema import ClusterConfig, ControllerConfig, ModelConfig
from cluster.controller.config_follower import ConfigFollower
from cluster.domain.errors import ConfigError, NoFeasiblePlan, ReplicaError

A = ModelConfig(model="/models/a")
A2 = A.model_copy(update={"replicas": 2})


class Site:
    """A file, what it means, and what the controller says to it."""

    def __init__(self, folder) -> None:
        self.file = folder / "cluster.yaml"
        self.said: list[str] = []
        self.applied: list[tuple[int, ...]] = []
        self.refuse: Exception | None = None
        self.meaning: ClusterConfig | ConfigError = ClusterConfig(models=(A,))
        self.write(ClusterConfig(models=(A,)))

    def write(self, meaning) -> None:
        self.meaning = meaning
        self.file.write_text(str(meaning))

    def load(self) -> ClusterConfig:
        if isinstance(self.meaning, ConfigError):
            raise self.meaning
        return self.meaning

    def apply(self, models) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.applied.append(tuple(model.replicas for model in models))

    def follower(self, config=None) -> ConfigFollower:
        return ConfigFollower(config or self.load(), self.file, self.load, self.apply, self.said.append)


def look(follower: ConfigFollower) -> None:
    """Until it has read a new content: two steps have to find the same."""
    follower.step()
    follower.step()


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def test_models_are_applied_once_and_again_when_they_change(site):
    follower = site.follower()
    for _ in range(3):
        follower.step()
    assert site.applied == [(1,)]
    site.write(ClusterConfig(models=(A2,)))
    for _ in range(3):
        follower.step()
    assert site.applied == [(1,), (2,)]


def test_a_touched_file_changes_nothing(site):
    follower = site.follower()
    follower.step()
    site.file.write_text(site.file.read_text() + "# a comment\n")
    look(follower)
    assert site.applied == [(1,)]
    assert len(site.said) == 1


def test_what_was_applied_by_hand_stays_until_the_file_names_models(site):
    site.write(ClusterConfig())
    follower = site.follower()
    follower.step()
    assert site.applied == []
    for meaning in (ClusterConfig(models=(A,)), ClusterConfig()):
        site.write(meaning)
        look(follower)
    assert site.applied == [(1,), ()]


def test_models_wait_for_their_nodes_and_that_is_said_once(site):
    follower = site.follower()
    site.refuse = NoFeasiblePlan("no room")
    for _ in range(3):
        follower.step()
    assert site.said == ["Waiting for nodes: no room"]
    site.refuse = None
    follower.step()
    assert site.applied == [(1,)]


def test_a_bad_config_is_refused_in_one_line_and_the_old_one_stays(site):
    follower = site.follower()
    follower.step()
    site.write(ConfigError("modles is no setting"))
    for _ in range(3):
        follower.step()
    assert site.applied == [(1,)]
    assert site.said[1:] == ["The changed config is refused, nothing is changed: modles is no setting"]
    site.write(ClusterConfig(models=(A2,)))
    look(follower)
    assert site.applied == [(1,), (2,)]


def test_models_that_the_controller_refuses_are_not_tried_again(site):
    follower = site.follower()
    follower.step()
    site.write(ClusterConfig(models=(A2,)))
    site.refuse = ConfigError("no such directory")
    for _ in range(3):
        follower.step()
    assert site.said[1:] == ["The changed config is refused, nothing is changed: no such directory"]
    site.refuse = None
    look(follower)
    assert site.applied == [(1,)]


def test_the_first_models_are_the_commands_own(site):
    site.refuse = ConfigError("no such directory")
    with pytest.raises(ConfigError, match="no such directory"):
        site.follower().step()


def test_a_controller_that_is_away_is_asked_again(site):
    follower = site.follower()
    site.refuse = ReplicaError("it is starting")
    follower.step()
    site.refuse = None
    follower.step()
    assert site.applied == [(1,)]


def test_other_settings_need_a_restart_and_models_change_all_the_same(site):
    follower = site.follower()
    follower.step()
    site.write(ClusterConfig(models=(A2,), controller=ControllerConfig(port=7)))
    look(follower)
    assert site.said[1] == "Changed in the config, needs a restart: controller.port."
    assert site.applied == [(1,), (2,)]


def test_without_a_file_there_is_nothing_to_follow(site):
    follower = ConfigFollower(ClusterConfig(models=(A,)), None, site.load, site.apply, site.said.append)
    site.write(ClusterConfig(models=(A2,)))
    follower.step()
    follower.step()
    assert site.applied == [(1,)]


def test_a_file_that_changed_before_it_was_followed_counts_too(site):
    loaded = site.load()
    site.write(ClusterConfig(models=(A2,)))  # while Ray's head was starting
    look(site.follower(loaded))
    assert site.applied == [(2,)]


def test_half_a_file_is_nobodys_wish(site):
    follower = site.follower()
    follower.step()
    site.write(ClusterConfig())  # an editor has emptied it and not yet written
    follower.step()
    site.write(ClusterConfig(models=(A2,)))
    look(follower)
    assert site.applied == [(1,), (2,)]
