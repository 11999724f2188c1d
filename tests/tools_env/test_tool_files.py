"""Facts about the file and todo tools, straight on their functions."""

import asyncio
import time

import pytest

from tools_env.errors import BadArguments, ToolError
from tools_env.tools import arguments, file, patch, todo
from tools_env.tools.base import CallContext

FILE = file.make_file_tool(max_file_chars=5_000, max_files=5)


@pytest.fixture
def use(tmp_path):
    """Calls a tool on a fresh session folder and returns the output's text."""
    (tmp_path / "session" / "workspace").mkdir(parents=True)
    call = CallContext(tmp_path / "session", {}, time.monotonic() + 60, 200)

    def run(tool, **given):
        arguments.check_arguments(tool.schema, given)
        return asyncio.run(tool.run(call, given)).text

    return run


def test_write_append_read_stat_list(use):
    assert use(FILE, op="write", path="notes/a.md", content="one\n") == "wrote 4 characters to notes/a.md"
    assert use(FILE, op="append", path="notes/a.md", content="二\n") == "appended 2 characters to notes/a.md"
    assert use(FILE, op="read", path="notes/a.md") == "one\n二\n"
    assert use(FILE, op="stat", path="notes/a.md") == "notes/a.md: 6 characters, 2 lines"
    assert use(FILE, op="list") == "notes/a.md 6 characters"


def test_pages_of_a_file_put_together_are_the_file(use):
    text = "".join(f"line {i} of the file\n" for i in range(60)) + "x" * 500
    use(FILE, op="write", path="a", content=text)
    whole, offset = "", 0
    while offset is not None:
        body, _, note = use(FILE, op="read", path="a", offset=offset).partition("\n... ")
        following = int(note.rsplit(" ", 1)[1]) if note else None
        whole += (body + "\n")[: (following or len(text)) - offset]
        offset = following
    assert whole == text


def test_limit_bounds_a_page(use):
    use(FILE, op="write", path="a", content="abcdefgh")
    assert use(FILE, op="read", path="a", offset=2, limit=3) == "cde\n... 3 characters left; read with offset 5"


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "link/x", "a\0b", "x" * 300, "."])
def test_no_path_leads_outside_or_breaks_the_tool(use, tmp_path, path):
    (tmp_path / "session" / "workspace" / "link").symlink_to(tmp_path)
    for op in ("read", "write", "stat"):
        with pytest.raises(ToolError):
            use(FILE, op=op, path=path, content="x")
    assert not (tmp_path / "x").exists() and not (tmp_path / "session" / "x").exists()


def test_quotas_and_missing_things_are_told(use):
    with pytest.raises(ToolError, match="at most 5000 are allowed"):
        use(FILE, op="write", path="a", content="x" * 5001)
    for i in range(5):
        use(FILE, op="write", path=str(i), content="")
    with pytest.raises(ToolError, match="5 files already"):
        use(FILE, op="write", path="6", content="")
    with pytest.raises(ToolError, match="does not exist"):
        use(FILE, op="read", path="7")
    with pytest.raises(ToolError, match="past the end"):
        use(FILE, op="read", path="1", offset=1)
    with pytest.raises(BadArguments, match="patch needs anchor"):
        use(FILE, op="patch", path="1")


def test_exact_patch_replaces_only_the_anchor():
    done = patch.apply_patch("a b c\nd e f\n", "b c\nd", "X")
    assert (done.text, done.first_line, done.last_line, done.exact) == ("a Xe f\n".replace("Xe", "X e"), 1, 2, True)


def test_patch_with_typos_finds_the_right_lines():
    lines = [f"{i * 7919 % 1000:b} speaks about the subject {i * 104729 % 9973:b}." for i in range(300)]
    anchor = lines[123].replace("speaks", "speeks").replace("subject", "subjct")
    done = patch.apply_patch("\n".join(lines), anchor, "NEW")
    assert done.text.split("\n")[123] == "NEW" and not done.exact
    assert done.text.split("\n")[:123] + done.text.split("\n")[124:] == lines[:123] + lines[124:]


def test_patch_deletes_with_an_empty_replacement():
    assert patch.apply_patch("one\ntwo thing\nthree", "two thingg", "").text == "one\nthree"


@pytest.mark.parametrize(
    "text, anchor, message",
    [
        ("x\nx", "x", "stands in 2 places"),
        (
            "The capital is Vienna, as known.\nother\nThe capital is Vienna; as known.",
            "The capital is Vienna: as known.",
            "several",
        ),
        ("alpha\nbeta", "something quite different", "anchor not found"),
        ("", "anything", "anchor not found"),
        ("a", "  ", "anchor is empty"),
    ],
)
def test_patch_refuses_rather_than_guesses(text, anchor, message):
    with pytest.raises(ToolError, match=message):
        patch.apply_patch(text, anchor, "y")


def test_failed_patch_leaves_the_file(use):
    use(FILE, op="write", path="a", content="alpha")
    with pytest.raises(ToolError):
        use(FILE, op="patch", path="a", anchor="zzzzzz", replacement="b")
    assert use(FILE, op="read", path="a") == "alpha"
    assert use(FILE, op="patch", path="a", anchor="lph", replacement="LPH") == "patched a line 1"
    assert use(FILE, op="read", path="a") == "aLPHa"


def test_todo_infers_what_is_meant(use):
    assert use(todo.TOOL) == "No todo list."
    assert use(todo.TOOL, items=["find", "write"]) == "created\n1. [ ] find\n2. [ ] write"
    assert (
        use(todo.TOOL, items=[{"id": 1, "status": "done"}, "check"])
        == "updated\n1. [x] find\n2. [ ] write\n3. [ ] check"
    )
    assert use(todo.TOOL, items=[{"id": 2, "status": "deleted"}]) == "updated\n1. [x] find\n3. [ ] check"
    assert use(todo.TOOL) == "todo\n1. [x] find\n3. [ ] check"
    assert use(todo.TOOL, items=["new", {"text": "now", "status": "active"}]) == "rewritten\n1. [ ] new\n2. [>] now"
    assert use(todo.TOOL, items=[]) == "deleted"
    assert use(todo.TOOL) == "No todo list."


def test_todo_update_of_an_unknown_item_changes_nothing(use):
    use(todo.TOOL, items=["find"])
    with pytest.raises(ToolError, match="no item 7; the list has 1"):
        use(todo.TOOL, items=[{"id": 1, "status": "done"}, {"id": 7, "status": "done"}])
    assert use(todo.TOOL) == "todo\n1. [ ] find"
