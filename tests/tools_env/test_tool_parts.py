"""Facts about the cache, shared work, limits, leases, and what the package may import."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tools_env.cache import retrieval as cache
from tools_env.cache.shared_work import SharedWork
from tools_env.errors import RetryLater, ToolError, ToolHostError, UnknownSession
from tools_env.service.limits import ConcurrencyLimit
from tools_env.service.sessions import Budget, Sessions, SessionSpec
from tools_env.tools.implicit_context import whole_lines

ROOT = Path(__file__).resolve().parents[2]


def test_cache_key_ignores_field_order_but_not_version():
    assert cache.cache_key("t", "1", {"a": 1, "b": 2}) == cache.cache_key("t", "1", {"b": 2, "a": 1})
    assert cache.cache_key("t", "1", {}) != cache.cache_key("t", "2", {})


def test_cache_computes_once_for_concurrent_callers_and_never_keeps_a_failure():
    async def main():
        store, count = cache.RetrievalCache(), 0

        async def compute():
            nonlocal count
            count += 1
            await asyncio.sleep(0)
            if count == 1:
                raise ToolError("HTTP 503")
            return {"n": count}

        failed = await asyncio.gather(*(store.get("k", compute) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(f, ToolError) for f in failed) and count == 1
        found = await asyncio.gather(*(store.get("k", compute) for _ in range(5)))
        assert found == [({"n": 2}, False)] * 5
        assert await store.get("k", compute) == ({"n": 2}, True)

    asyncio.run(main())


def test_cache_forgets_the_least_recently_used():
    async def main():
        store = cache.RetrievalCache(entries=2)

        async def one():
            return 1

        for key in ("a", "b", "a", "c"):
            await store.get(key, one)
        assert [(await store.get(key, one))[1] for key in ("a", "c", "b")] == [True, True, False]

    asyncio.run(main())


def test_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "cache.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ToolHostError, match="not a usable retrieval cache"):
        cache.RetrievalCache(tmp_path / "cache.sqlite")


def test_shared_work_survives_one_caller_and_ends_with_the_last():
    async def main():
        shared, ended = SharedWork(), []

        async def work():
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        one, two = (asyncio.create_task(shared.run("k", work)) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.gather(one, return_exceptions=True)
        assert not ended and len(shared) == 1
        two.cancel()
        await asyncio.gather(two, return_exceptions=True)
        await asyncio.sleep(0)
        assert ended == [True] and len(shared) == 0

    asyncio.run(main())


def test_limit_counts_right_under_cancellation():
    async def main():
        limit, gate = ConcurrencyLimit("t", 1, 1), asyncio.Event()

        async def hold():
            async with limit.slot():
                await gate.wait()

        running, waiting = asyncio.create_task(hold()), asyncio.create_task(hold())
        await asyncio.sleep(0)
        with pytest.raises(RetryLater):
            await hold()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert limit.waiting == 0
        gate.set()
        await running
        await asyncio.wait_for(hold(), 1)

    asyncio.run(main())


def test_idle_session_ends_with_its_lease_and_takes_its_files_along(tmp_path):
    now = [0.0]
    sessions = Sessions(tmp_path, lease=10.0, clock=lambda: now[0])
    idle, used = (sessions.open(SessionSpec(name, name, Budget())) for name in "ab")
    now[0] = 8.0

    async def call():
        async def reply():
            return "r"

        await used.once("0", "x", reply)

    asyncio.run(call())
    now[0] = 12.0
    assert sessions.reap() == [idle.id]
    with pytest.raises(UnknownSession, match="lease"):
        sessions.get(idle.id)
    assert sessions.get(used.id) is used and not idle.directory.exists() and used.directory.exists()


def test_repeated_open_request_gets_the_same_session(tmp_path):
    sessions = Sessions(tmp_path, lease=10.0)
    assert sessions.open(SessionSpec("r", "e", Budget())) is sessions.open(SessionSpec("r", "e", Budget()))
    assert sessions.open(SessionSpec("s", "e", Budget())) is not sessions.open(SessionSpec("r", "e", Budget()))


def test_cut_first_passage_keeps_its_citation():
    cut = whole_lines("head\n" + "word " * 50 + "end. \\cite{web_babababa}\nnext \\cite{web_bebebebe}", 90)
    assert len(cut) <= 90 and cut.startswith("head\nword word") and cut.endswith("... \\cite{web_babababa}")


def test_summary_does_not_end_in_the_head_of_a_passage_left_out():
    block = "1. One | a.test\nfirst fact \\cite{web_babababa}\n2. Two | b.test\n" + "long " * 40
    assert whole_lines(block, 80) == "1. One | a.test\nfirst fact \\cite{web_babababa}"


def imported(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_package_imports_neither_jax_nor_the_training_code():
    modules = imported(
        "import tools_env.server, tools_env.process, tools_env.client, tools_env.web.page, tools_env.tools.patch"
    )
    assert not modules & {"jax", "jaxlib", "stepdr_jax", "flax", "tensorflow", "torch"}
    for source in (ROOT / "tools_env").rglob("*.py"):
        for line in source.read_text().splitlines():
            words = line.split()
            assert not (words[:1] in (["import"], ["from"]) and words[1].split(".")[0] in ("jax", "stepdr_jax")), source


def test_client_import_stays_light():
    assert not imported("import tools_env.client") & {
        "aiohttp",
        "tantivy",
        "lxml",
        "trafilatura",
        "pypdfium2",
        "pydantic",
    }


def test_stubs_fit_the_proto(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    source = ROOT / "tools_env" / "protocol" / "tools.proto"
    assert protoc.main(["protoc", f"-I{ROOT}", f"--python_out={tmp_path}", str(source)]) == 0
    made = (tmp_path / "tools_env" / "protocol" / "tools_pb2.py").read_text()
    kept = (ROOT / "tools_env" / "protocol" / "tools_pb2.py").read_text()
    assert made.split("AddSerializedFile", 1)[1] == kept.split("AddSerializedFile", 1)[1]


def test_a_tool_that_is_called_instant_never_waits(tmp_path):
    """Their calls have no task of their own, so a wait in one would hold its caller beyond the deadline."""
    from tools_env.tools import file, todo
    from tools_env.tools.base import CallContext

    (tmp_path / "workspace").mkdir()
    calls = [(todo.TOOL, {}), (todo.TOOL, {"items": ["a"]}), (todo.TOOL, {"items": []})]
    tool = file.make_file_tool(1000, 10)
    calls += [(tool, {"op": op, "path": "a", "content": "x"}) for op in ("write", "append", "read", "stat")]
    calls.append((tool, {"op": "list"}))
    calls.append((tool, {"op": "patch", "path": "a", "anchor": "xx", "replacement": "y"}))
    for one, arguments in calls:
        assert one.instant
        with pytest.raises(StopIteration):
            one.run(CallContext(tmp_path, {}, 0.0, 700), arguments).send(None)
