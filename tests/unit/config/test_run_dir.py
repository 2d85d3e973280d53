from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cluster.config.run_dir import MAX_RUN_DIR_BYTES, default_run_dir, open_ray_dir, open_run_dir, ray_dir
from cluster.domain.errors import ConfigError


class TestDefault:
    def test_the_variable_wins(self) -> None:
        env = {"LLM_CLUSTER_RUN_DIR": "/x/y", "XDG_RUNTIME_DIR": "/run/user/7"}
        assert default_run_dir(env) == Path("/x/y")

    def test_then_the_session_of_the_user(self) -> None:
        assert default_run_dir({"XDG_RUNTIME_DIR": "/run/user/1000"}) == Path("/run/user/1000/llm-cluster")

    def test_then_tmp_with_the_user_id(self) -> None:
        assert default_run_dir({}, uid=42) == Path("/tmp/llm-cluster-42")

    def test_the_defaults_are_short_enough_for_rays_sockets(self) -> None:
        for default in (default_run_dir({}, uid=2**32 - 1), default_run_dir({"XDG_RUNTIME_DIR": "/run/user/65534"})):
            assert ray_dir(default).is_relative_to(default)


class TestOpen:
    def test_makes_it_for_the_owner_only(self, short_tmp_path: Path) -> None:
        made = open_run_dir(short_tmp_path / "a" / "b")
        assert stat.S_IMODE(made.stat().st_mode) == 0o700

    def test_twice_is_as_good_as_once(self, short_tmp_path: Path) -> None:
        assert open_run_dir(short_tmp_path / "a") == open_run_dir(short_tmp_path / "a")

    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
    def test_refuses_what_others_may_write_to(self, short_tmp_path: Path, mode: int) -> None:
        (short_tmp_path / "a").mkdir()
        (short_tmp_path / "a").chmod(mode)
        with pytest.raises(ConfigError, match="chmod 700"):
            open_run_dir(short_tmp_path / "a")

    def test_refuses_somebody_elses(self, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (short_tmp_path / "a").mkdir(mode=0o700)
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
        with pytest.raises(ConfigError, match="belongs to another user"):
            open_run_dir(short_tmp_path / "a")

    def test_refuses_a_link(self, short_tmp_path: Path) -> None:
        (short_tmp_path / "real").mkdir(mode=0o700)
        (short_tmp_path / "link").symlink_to(short_tmp_path / "real")
        with pytest.raises(ConfigError, match="is no directory"):
            open_run_dir(short_tmp_path / "link")

    def test_refuses_a_file(self, short_tmp_path: Path) -> None:
        (short_tmp_path / "a").write_text("x")
        with pytest.raises(ConfigError, match="cannot be made"):
            open_run_dir(short_tmp_path / "a")

    def test_a_long_name_sends_ray_elsewhere_and_always_to_the_same_place(self, tmp_path: Path) -> None:
        short, long = Path("/" + "x" * (MAX_RUN_DIR_BYTES - 1)), tmp_path / ("x" * MAX_RUN_DIR_BYTES)
        assert ray_dir(short) == short / "ray/session"
        assert len(str(ray_dir(long))) < MAX_RUN_DIR_BYTES + len("/ray/session")
        assert ray_dir(long) == ray_dir(long)
        assert ray_dir(long) != ray_dir(long / "y")

    def test_rays_folder_is_closed_again_where_ray_opened_it(self, short_tmp_path: Path) -> None:
        run_dir = open_run_dir(short_tmp_path / "a")
        folder = open_ray_dir(run_dir)
        assert folder.is_relative_to(run_dir)
        folder.chmod(0o777)
        assert stat.S_IMODE(open_ray_dir(run_dir).stat().st_mode) == 0o700

    def test_rays_folder_is_private(self, tmp_path: Path) -> None:
        folder = open_ray_dir(open_run_dir(tmp_path / ("x" * 40)))
        try:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        finally:
            folder.rmdir()
