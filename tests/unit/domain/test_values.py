from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.domain.clock import Clock, ManualClock, MonotonicClock
from cluster.domain.errors import ConfigError
from cluster.domain.hardware import DEVICE_TYPES, DeviceKind, Node, cpu_device, device_type, uniform_inventory
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.model_spec import Dtype, ModelSpec
from cluster.domain.parallel_layout import ParallelLayout, Placement, RankPlacement, grain_size
from cluster.domain.quantities import GB, GIB, format_bytes, format_seconds, parse_bytes
from cluster.domain.request import SamplingParams

LLAMA_8B = ModelSpec(
    architecture="LlamaForCausalLM", model_type="llama", hidden_size=4096, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, ffn_size=14336, vocab_size=128256, max_position_embeddings=131072,
    dtype=Dtype.BFLOAT16,
)  # fmt: skip


class TestIds:
    @given(st.text(min_size=1), st.integers(0, 10**9))
    def test_a_replica_id_reads_back(self, model: str, slot: int) -> None:
        assert ReplicaId.parse(str(ReplicaId(model, slot))) == ReplicaId(model, slot)

    @pytest.mark.parametrize("text", ["", "demo", "/0", "demo/", "demo/x", "demo/-1", "demo/1.5"])
    def test_what_is_no_replica_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="MODEL/SLOT"):
            ReplicaId.parse(text)

    def test_names_nest(self) -> None:
        assert str(RankId(Incarnation(ReplicaId("demo", 1), 7), 3)) == "demo/1#7.3"

    def test_a_later_life_is_greater(self) -> None:
        replica = ReplicaId("demo", 0)
        assert Incarnation(replica, 2) > Incarnation(replica, 1)


class TestQuantities:
    @pytest.mark.parametrize(
        ("text", "amount"),
        [("80GB", 80 * GB), ("2 GiB", 2 * GIB), ("512m", 512 * 2**20), ("17", 17), ("1.5kB", 1500), (" 3 b ", 3)],
    )
    def test_bytes_read(self, text: str, amount: int) -> None:
        assert parse_bytes(text) == amount

    @pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 GX", "1,5GB", "1GB2"])
    def test_no_bytes_are_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="write for example"):
            parse_bytes(text)

    @given(st.integers(0, 10**15))
    def test_what_is_written_reads_back_within_its_three_figures(self, amount: int) -> None:
        assert parse_bytes(format_bytes(amount)) == pytest.approx(amount, rel=0.006, abs=1)

    @pytest.mark.parametrize(
        ("amount", "text"),
        [(0, "0 B"), (999, "999 B"), (52_600_000_000, "52.6 GB"), (999_499_999, "999 MB"), (999_999_999, "1000 MB")],
    )
    def test_bytes_written(self, amount: int, text: str) -> None:
        assert format_bytes(amount) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(5e-6, "5 us"), (0.0012, "1.2 ms"), (35, "35 s"), (119, "119 s"), (240, "4 min")],
    )
    def test_seconds_written(self, seconds: float, text: str) -> None:
        assert format_seconds(seconds) == text


class TestHardware:
    def test_published_devices_are_found_by_name(self) -> None:
        assert device_type("H100").memory_bytes == 80 * GB
        assert all(t.kind is DeviceKind.CUDA and t.name == name for name, t in DEVICE_TYPES.items())

    def test_an_unknown_device_lists_the_known(self) -> None:
        with pytest.raises(ConfigError, match=r"h100.*and cpu"):
            device_type("h1000")

    def test_uniform_inventory(self) -> None:
        inventory = uniform_inventory(3, 8, device_type("a100"))
        assert inventory.free_devices == 24
        assert len({node.node_id for node in inventory.nodes}) == 3

    def test_more_free_than_there_are_cannot_be(self) -> None:
        with pytest.raises(AssertionError):
            Node("n", "h", cpu_device(GIB), devices=1, free_devices=2)


class TestModelSpec:
    def test_kv_bytes_of_llama_3_8b(self) -> None:
        assert LLAMA_8B.kv_bytes_per_token(Dtype.BFLOAT16) == 131072
        assert LLAMA_8B.kv_bytes_per_token(Dtype.FLOAT32) == 262144

    def test_heads_that_do_not_divide_cannot_be(self) -> None:
        with pytest.raises(AssertionError):
            dataclasses.replace(LLAMA_8B, num_kv_heads=5)

    def test_item_sizes(self) -> None:
        assert [d.itemsize for d in (Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.FLOAT16)] == [4, 2, 2]


class TestLayout:
    @given(st.integers(1, 16), st.integers(1, 16))
    def test_stages_are_contiguous_and_equal(self, tp: int, pp: int) -> None:
        layout = ParallelLayout(tp, pp)
        ranks = range(layout.world_size)
        assert [layout.stage_of(r) for r in ranks] == [s for s in range(pp) for _ in range(tp)]
        assert {(layout.stage_of(r), layout.tensor_rank_of(r)) for r in ranks} == {
            (s, t) for s in range(pp) for t in range(tp)
        }

    def test_no_rank_is_no_layout(self) -> None:
        with pytest.raises(AssertionError):
            ParallelLayout(0)

    @given(st.integers(1, 100_000), st.integers(1, 64))
    def test_a_grain_leaves_no_rank_empty(self, ffn: int, tp: int) -> None:
        grain = grain_size(ffn, tp)
        assert grain in {1, 2, 4, 8, 16, 32, 64}
        assert grain == 1 or ffn // grain >= tp
        assert grain == 64 or ffn // (grain * 2) < tp  # the largest such

    def test_placement_is_in_rank_order(self) -> None:
        a, b = RankPlacement(0, "n1", "h1"), RankPlacement(1, "n0", "h0")
        assert Placement((a, b)).node_ids == ("n1", "n0")
        with pytest.raises(AssertionError):
            Placement((b, a))


class TestSamplingParams:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1},
            {"repetition_penalty": 0}, {"seed": -1}, {"seed": 2**64},
        ],
    )  # fmt: skip
    def test_wrong_values_cannot_be_built(self, wrong: dict[str, float]) -> None:
        with pytest.raises(AssertionError):
            SamplingParams(**{"max_tokens": 1, **wrong})

    def test_zero_temperature_is_greedy(self) -> None:
        assert SamplingParams(1).greedy
        assert not SamplingParams(1, temperature=0.1).greedy


class TestClocks:
    def test_a_manual_clock_moves_when_told(self) -> None:
        clock = ManualClock(5.0)
        clock.advance(1.5)
        assert clock.now() == 6.5
        with pytest.raises(AssertionError):
            clock.advance(-1)

    def test_the_machines_clock_does_not_run_backwards(self) -> None:
        clock: Clock = MonotonicClock()
        readings = [clock.now() for _ in range(100)]
        assert readings == sorted(readings)
