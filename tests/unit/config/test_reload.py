from __future__ import annotations

from pathlib import Path

from cluster.config.reload import change_between, content_digest
from cluster.config.schema import ClusterConfig, ControllerConfig, ModelConfig

A, B = ModelConfig(model="/models/a"), ModelConfig(model="/models/b")
RUNNING = ClusterConfig(models=(A,))


def test_nothing_changed() -> None:
    change = change_between((A,), RUNNING, ClusterConfig(models=(A,)))
    assert (change.models, change.needs_restart) == (None, ())


def test_models_are_compared_with_those_asked_for_last() -> None:
    assert change_between((A,), RUNNING, ClusterConfig(models=(A, B))).models == (A, B)
    assert change_between((A, B), RUNNING, ClusterConfig(models=(A,))).models == (A,)
    assert change_between((A,), RUNNING, ClusterConfig()).models == ()


def test_other_settings_are_named_as_they_are_written() -> None:
    new = ClusterConfig(models=(A,), cluster_name="other", controller=ControllerConfig(port=1, rank_silence_s=9.0))
    assert change_between((A,), RUNNING, new).needs_restart == (
        "cluster_name", "controller.port", "controller.rank_silence_s",
    )  # fmt: skip


def test_a_file_is_its_content_wherever_the_link_leads(tmp_path: Path) -> None:
    for name, text in (("v1", "a"), ("v2", "b"), ("v3", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(text)
    digests = []
    for name in ("v1", "v2", "v3"):
        (tmp_path / "draft").symlink_to(tmp_path / name)
        (tmp_path / "draft").replace(tmp_path / "current")
        digests.append(content_digest(tmp_path / "current" / "f"))
    assert digests[0] == digests[2] != digests[1]
    assert content_digest(tmp_path / "none") == ""
