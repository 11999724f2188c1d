"""Facts about files that are whole or absent."""

import os
import subprocess

import pytest

from stepdr_jax import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_atomic(tmp_path / "x.json", "old")
    with pytest.raises(RuntimeError), files.atomic_path(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old"


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_ones_stays(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        (tmp_path / f".x.json.{process}.tmp").write_text("half")
    files.write_atomic(tmp_path / "x.json", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".x.json.{os.getppid()}.tmp", "x.json"]
