"""Attacks on the host through a workspace that someone else writes to: links, pipes, devices, races, huge files."""

import asyncio
import contextlib
import os
import shutil
import threading
import time

import pytest

from tools_env.errors import ToolError
from tools_env.tools import arguments, file, implicit_context, workspace
from tools_env.tools.base import CallContext

FILE = file.make_file_tool(max_file_chars=5_000, max_files=50)


@pytest.fixture
def room(tmp_path):
    """A session's workspace beside a secret."""
    (tmp_path / "session" / "workspace").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "session" / "workspace"


def use(room, **given) -> str:
    arguments.check_arguments(FILE.schema, given)
    return asyncio.run(FILE.run(CallContext(room.parent, {}, time.monotonic() + 60, 2_000), given)).text


def test_links_are_named_and_never_followed(room, tmp_path):
    (room / "file").symlink_to(tmp_path / "secret")
    (room / "folder").symlink_to(tmp_path)
    (room / "inner").symlink_to("real")
    (room / "real").write_text("real")
    for path in ("file", "folder/secret", "inner"):
        for op in ("read", "stat", "append"):
            with pytest.raises(ToolError, match="symbolic link"):
                use(room, op=op, path=path, content="x")
    with pytest.raises(ToolError, match="symbolic link"):
        use(room, op="write", path="folder/new", content="x")
    with pytest.raises(ToolError, match="symbolic link"):
        use(room, op="list", path="folder")
    assert use(room, op="list").splitlines() == [
        "file symbolic link",
        "inner symbolic link",
        "real 4 characters",
    ]
    assert (tmp_path / "secret").read_text() == "secret" and not (tmp_path / "new").exists()


def test_writing_over_a_link_replaces_the_link(room, tmp_path):
    (room / "file").symlink_to(tmp_path / "secret")
    use(room, op="write", path="file", content="mine")
    assert (tmp_path / "secret").read_text() == "secret" and (room / "file").read_text() == "mine"
    assert not (room / "file").is_symlink()


@pytest.mark.parametrize("path", ["..", "../secret", "a/../../secret", "/etc/passwd", "//etc/passwd", "./../secret"])
def test_paths_that_lead_outside_are_refused(room, path):
    for op in ("read", "write", "append", "stat", "list"):
        with pytest.raises(ToolError, match="outside the workspace"):
            use(room, op=op, path=path, content="x")


def test_paths_inside_may_go_up_and_down(room):
    use(room, op="write", path="a/../b/./c", content="x")
    assert use(room, op="list") == "b/c 1 characters"


def test_pipes_devices_and_folders_do_not_hold_the_host(room):
    os.mkfifo(room / "pipe")
    (room / "folder").mkdir()
    started = time.monotonic()
    with pytest.raises(ToolError, match="not a regular file"):
        use(room, op="read", path="pipe")
    with pytest.raises(ToolError, match="is a folder"):
        use(room, op="read", path="folder")
    assert "pipe not a regular file" in use(room, op="list")
    assert time.monotonic() - started < 2


def test_a_huge_or_binary_file_is_told_not_read(room):
    with open(room / "huge", "wb") as huge:
        huge.truncate(1 << 40)
    (room / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ToolError, match="at most 20000 can be read"):
        use(room, op="read", path="huge")
    with pytest.raises(ToolError, match="not UTF-8"):
        use(room, op="read", path="binary")
    assert use(room, op="list") == "binary 3 bytes\nhuge 1099511627776 bytes"


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_link_that_is_swapped_in_while_the_host_looks_is_not_followed(room, tmp_path, op):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            shutil.rmtree(room / "way", ignore_errors=True)
            with contextlib.suppress(OSError):
                (room / "way").symlink_to(tmp_path / "outside")
            with contextlib.suppress(OSError):
                os.unlink(room / "way")
            with contextlib.suppress(OSError):
                (room / "way").mkdir()
                (room / "way" / "file").write_text("public")

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = set()
    try:
        for _ in range(1_500):
            with contextlib.suppress(ToolError):
                if op == "read":
                    seen.add(workspace.read_bytes(room, "way/file", 100))
                else:
                    workspace.replace(room, "way/file", b"written")
    finally:
        stop.set()
        swapper.join()
    assert b"secret" not in seen
    assert (tmp_path / "outside" / "file").read_text() == "secret"
    assert len(list((tmp_path / "outside").iterdir())) == 1


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(room, monkeypatch):
    use(room, op="write", path="a", content="old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ToolError, match="No space left"):
        use(room, op="write", path="a", content="new")
    assert [path.name for path in room.iterdir()] == ["a"] and (room / "a").read_text() == "old"


def test_long_results_are_not_stored_through_a_link(room, tmp_path):
    (tmp_path / "outside").mkdir()
    (room / "results").symlink_to(tmp_path / "outside")
    path = implicit_context.store_result(room, "x" * 1000)
    assert path == "" and not list((tmp_path / "outside").iterdir())
    assert "could not be stored" in implicit_context.shorten_result("x\n" * 1000, ["x\n" * 1000], path, 200)


def test_a_list_of_very_many_files_is_cut(room):
    for i in range(file.MAX_LISTED + 20):
        (room / f"{i:04d}").touch()
    assert "more than 500 files" in use(room, op="list")
