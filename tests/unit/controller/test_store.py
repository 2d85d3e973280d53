from __future__ import annotations

import json

import pytest

from cluster.controller.controller_actor import port_to_bind
from cluster.controller.fleet import SlotRecord
from cluster.controller.store import Store, StoredState
from cluster.domain.errors import ConfigError
from cluster.domain.ids import ReplicaId
from cluster.domain.parallel_layout import ParallelLayout, StageLayers
from tests.unit.controller.builders import model


def test_no_file_is_an_empty_state(tmp_path):
    assert Store(tmp_path).load() == StoredState()


def test_what_is_saved_is_loaded(tmp_path):
    slots = {ReplicaId("org.model-x", 3): SlotRecord(7, "f", 4)}
    stages = {"layout": ParallelLayout(1, 2), "stages": (StageLayers(0, 3), StageLayers(3, 4))}
    models = (model(), model("b", 0, 1, revision="abc"), model("c", 1, **stages))
    state = StoredState(2, models, slots, 88, 50052, "abc")
    Store(tmp_path).save(state)
    assert Store(tmp_path).load() == state
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["controller.json"]


def test_a_state_from_before_there_were_stages_is_read(tmp_path):
    state = StoredState(2, (model(),), state_id="abc")
    Store(tmp_path).save(state)
    path = Store(tmp_path).path
    stored = json.loads(path.read_text())
    del stored["models"][0]["stages"]
    path.write_text(json.dumps(stored))
    assert Store(tmp_path).load() == state


def test_every_life_is_counted(tmp_path):
    assert [Store(tmp_path).begin_life().life for _ in range(3)] == [1, 2, 3]


def test_a_state_keeps_its_name_for_as_long_as_its_file(tmp_path):
    names = [Store(tmp_path).begin_life().state_id for _ in range(2)]
    assert names[0] == names[1] != ""
    Store(tmp_path).path.unlink()
    assert Store(tmp_path).begin_life().state_id not in (names[0], "")


@pytest.mark.parametrize(
    ("configured", "again", "port"), [(50052, True, 50052), (50052, False, 50052), (0, True, 40001), (0, False, 0)]
)
def test_only_a_restarted_controller_must_have_its_old_port(configured, again, port):
    assert port_to_bind(configured, 40001, again=again) == port


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', "null"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, text):
    store = Store(tmp_path)
    store.save(StoredState())
    store.path.write_text(text)
    with pytest.raises(ConfigError, match=r"controller\.json is damaged .* remove that file"):
        store.load()


def test_a_damaged_model_is_damage_too(tmp_path):
    store = Store(tmp_path)
    store.save(StoredState(1, (model(),)))
    stored = json.loads(store.path.read_text())
    stored["models"][0]["weight_bytes_per_rank"] = [1]
    store.path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="damaged"):
        store.load()


def test_a_crash_while_writing_leaves_the_old_state(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save(StoredState(life=1))

    def crash(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(json, "dump", crash)
    with pytest.raises(OSError, match="no space"):
        store.save(StoredState(life=2))
    assert store.load().life == 1
