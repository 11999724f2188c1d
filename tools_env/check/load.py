"""A load generator: many sessions at once, mixed tools, and checks for lost, duplicated and leaked calls.

python -m tools_env.check.load --address=host:port --sessions=1000 --seconds=300
python -m tools_env.check.load --offline_web=DIR --workers=2
python -m tools_env.check.load --offline_web=DIR --workers=2 --kill=worker,redis --shell=0.1 --sessions=40

With --offline_web it starts a host, and a bare gRPC echo server for comparison; --kill also kills parts of the host.

Each session appends unique marks to a file, call after call, and reads the file at the end. A missing mark is a lost
call, a repeated mark a duplicated call, and a mark of another session a leak. Shell commands are counted in the same
way. At the end an answered call is repeated: its reply must be the same. A token is read from $STEPDR_TOOLS_TOKEN.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import sys
import time
from pathlib import Path

import grpc
import psutil

from tools_env.check import chaos
from tools_env.client import ToolInfraError, ToolsClient
from tools_env.errors import ToolHostError
from tools_env.process import ToolHost
from tools_env.service.settings import TOKEN_VARIABLE

SAMPLE_SECONDS = 1.0


@dataclasses.dataclass
class LoadReport:
    """Results of a run.

    `seconds_of` has the latency of each call, `memory` the MiB of all host processes once a second.
    """

    calls: int = 0
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    failed: dict[str, int] = dataclasses.field(default_factory=dict)  # gRPC status -> failed calls
    lost: int = 0
    duplicated: int = 0
    leaked: int = 0
    changed: int = 0  # repeated calls with a different reply
    shell_calls: int = 0
    ran_twice: int = 0  # shell commands that ran more than once
    not_run: int = 0  # shell commands that were acknowledged and did not run
    unexplained: int = 0  # shell commands that ran, and were neither acknowledged nor failed with a status
    seconds_of: list[float] = dataclasses.field(default_factory=list)
    memory: list[float] = dataclasses.field(default_factory=list)
    wall: float = 0.0

    @property
    def clean(self) -> bool:
        counts = self.lost, self.duplicated, self.leaked, self.changed, self.ran_twice, self.not_run, self.unexplained
        return not any(counts)

    def latency(self, share: float) -> float:
        """Milliseconds within which `share` of the calls were answered."""
        ordered = sorted(self.seconds_of)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


async def run_load(
    client: ToolsClient,
    *,
    sessions: int,
    seconds: float,
    think: float,
    calls: int = 1_000_000,
    seed: int = 0,
    pid: int | None = None,
    shell: float = 0.0,
) -> LoadReport:
    """Loads a host for `seconds` with `sessions` concurrent sessions.

    A session makes `calls` calls, `think` seconds apart on average, and checks its file; then the next session takes
    its place. `shell` is the share of calls that run a shell command. `pid` is the host's process, to sample its
    memory.
    """
    load, began = LoadReport(), time.monotonic()
    sampler = asyncio.create_task(_sample(load, pid)) if pid else None
    end = began + seconds

    async def place(i: int) -> None:
        episode = 0
        while episode == 0 or time.monotonic() < end:
            await _episode(client, load, f"{seed}-{i}" + (f"-{episode}" if episode else ""), end, think, calls, shell)
            episode += 1

    await asyncio.gather(*(place(i) for i in range(sessions)))
    load.wall = time.monotonic() - began
    if sampler:
        sampler.cancel()
    return load


async def _sample(load: LoadReport, pid: int) -> None:
    while True:
        with contextlib.suppress(psutil.Error):
            load.memory.append(sum(psutil.Process(p).memory_info().rss for p in process_tree(pid)) / 2**20)
        await asyncio.sleep(SAMPLE_SECONDS)


def process_tree(pid: int) -> list[int]:
    """Returns the process and all its descendants.

    Does not scan all processes of the machine, which would delay calls.
    """
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


async def _episode(
    client: ToolsClient, load: LoadReport, name: str, end: float, think: float, calls: int, shell: float
) -> None:
    draw = random.Random(name)
    await asyncio.sleep(draw.uniform(0.0, think))  # desynchronizes the sessions
    try:
        session = await client.open_session(name)
    except ToolInfraError as error:
        load.failed[error.status] = load.failed.get(error.status, 0) + 1
        await asyncio.sleep(1.0)
        return
    marks, number, asked = [], 0, {}
    commands: dict[int, bool] = {}  # number of a shell call -> whether it was acknowledged

    async def call(tool: str, arguments: dict):
        nonlocal number
        number += 1
        began = time.monotonic()
        try:
            result = await session.call(tool, arguments, call_id=str(number))
        except ToolInfraError as error:
            load.failed[error.status] = load.failed.get(error.status, 0) + 1
            return None
        load.seconds_of.append(time.monotonic() - began)
        load.calls += 1
        load.outcomes[result.outcome] = load.outcomes.get(result.outcome, 0) + 1
        asked["last"] = (tool, arguments, str(number), result)
        return result

    while time.monotonic() < end and number < calls:
        kind = draw.random()
        if draw.random() < shell:
            command = {"command": f"echo {number + 1} >> ran.txt"}
            answer = await call("shell", command)
            commands[number] = answer is not None and answer.outcome == "ok"
        elif kind < 0.4:
            mark = f"<{name}/{number}>"
            if await call("file", {"op": "append", "path": "marks.txt", "content": mark}) is not None:
                marks.append(mark)
        elif kind < 0.6:
            await call("batch_web_surfer", {"queries": [f"capital {draw.randrange(200)}"]})
        elif kind < 0.8:
            await call("todo", {"items": [f"step {number}"]})
        else:
            await call("file", {"op": "stat", "path": "marks.txt"})
        if think:
            await asyncio.sleep(draw.expovariate(1 / think))
    if "last" in asked:
        tool, arguments, call_id, first = asked["last"]
        with contextlib.suppress(ToolInfraError):
            load.changed += (await session.call(tool, arguments, call_id=call_id)).text != first.text

    async def whole(path: str) -> str:
        text, offset = "", 0
        while True:
            page = await call("file", {"op": "read", "path": path, "offset": offset})
            if page is None or page.outcome != "ok":
                return text
            body, _, tail = page.text.partition("\n... ")
            text, offset = text + body, offset + len(body)
            if not tail:
                return text

    text = await whole("marks.txt")
    if commands:
        ran = collections.Counter(map(int, (await whole("ran.txt")).split()))
        load.shell_calls += len(commands)
        load.ran_twice += sum(times > 1 for times in ran.values())
        load.not_run += sum(done and not ran[n] for n, done in commands.items())
        load.unexplained += sum(n not in commands for n in ran)
    found = text.split(">")[:-1]
    load.lost += sum(mark not in text for mark in marks)
    load.duplicated += len(found) - len(set(found))
    load.leaked += sum(not mark.startswith(f"<{name}/") for mark in found)
    await session.close()


async def call_rate(call, concurrency: int, seconds: float) -> float:
    """Returns the rate of `call(number)`, in calls per second, with `concurrency` calls at a time."""
    done, end = 0, time.monotonic() + seconds

    async def loop(place: int) -> None:
        nonlocal done
        number = place
        while time.monotonic() < end:
            await call(number)
            number += concurrency
            done += 1

    began = time.monotonic()
    await asyncio.gather(*(loop(i) for i in range(concurrency)))
    return done / (time.monotonic() - began)


ECHO = """
import asyncio, grpc
async def main():
    async def echo(request, context):
        return request
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""


async def against_echo(
    address: str, *, rounds: int = 3, concurrency: int = 64, seconds: float = 3.0, pid: int | None = None
) -> list[float]:
    """Returns, per round, the rate of a trivial call divided by that of a bare gRPC echo of equal size.

    Both are called through bare stubs, so that the client's cost is the same. With the host's `pid` the CPU time per
    call is also printed, which depends less than the rate on other load of the machine.
    """

    def spent(of: int) -> float:
        return sum(sum(psutil.Process(p).cpu_times()[:2]) for p in process_tree(of))

    from tools_env.protocol import tools_pb2

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", ECHO, stdout=asyncio.subprocess.PIPE)
    try:
        port = int(await process.stdout.readline())
        client, ratios = ToolsClient(address), []
        session = await client.open_session("echo")
        stub = client._connected()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            bare = channel.unary_unary(
                "/bare/Echo", tools_pb2.CallToolRequest.SerializeToString, tools_pb2.CallToolRequest.FromString
            )

            def request(number: int):
                return tools_pb2.CallToolRequest(
                    session_id=session.id, call_id=str(number), tool="todo", arguments_json="{}"
                )

            base = 0
            for _ in range(rounds):
                before = spent(process.pid), spent(pid or process.pid)
                echo = await call_rate(lambda n: bare(request(n), timeout=15), concurrency, seconds)
                ours = await call_rate(
                    lambda n, b=base: stub.CallTool(request(b + n), timeout=15), concurrency, seconds
                )
                base += 10_000_000
                line = f"echo {echo:,.0f} calls/s, trivial call {ours:,.0f} calls/s, ratio {ours / echo:.2f}"
                if pid:
                    costs = [
                        1e6 * (after - start) / (calls * seconds)
                        for start, after, calls in zip(
                            before, (spent(process.pid), spent(pid)), (echo, ours), strict=True
                        )
                    ]
                    line += f"; processor time of a call {costs[0]:.0f} and {costs[1]:.0f} us"
                print(line, flush=True)
                ratios.append(ours / echo)
        await session.close()
        await client.close()
        return ratios
    finally:
        process.kill()
        await process.wait()


def format_report(load: LoadReport) -> str:
    """Returns the results as text."""
    lines = [
        f"{load.calls:,} calls in {load.wall:.0f} s: {load.calls / load.wall:,.0f} calls/s, "
        f"p50 {load.latency(0.5):.1f} ms, p99 {load.latency(0.99):.1f} ms",
        f"outcomes {load.outcomes}, given up {load.failed or 'none'}",
        f"lost {load.lost}, duplicated {load.duplicated}, of another session {load.leaked}, "
        f"other replies {load.changed}",
    ]
    if load.shell_calls:
        lines.append(
            f"{load.shell_calls} shell commands: ran twice {load.ran_twice}, acknowledged and not run {load.not_run}, "
            f"run and unexplained {load.unexplained}"
        )
    if load.memory:
        fifth = max(len(load.memory) // 5, 1)
        early, late = (
            sum(part) / fifth for part in (load.memory[fifth : 2 * fifth] or load.memory[:1], load.memory[-fifth:])
        )
        lines.append(f"memory of the host {early:.0f} MB early, {late:.0f} MB late, peak {max(load.memory):.0f} MB")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="load", description=__doc__.split("\n")[0])
    parser.add_argument("--address", help="host:port of a running host")
    parser.add_argument("--offline_web", help="offline web directory; starts a host for it")
    parser.add_argument("--workers", type=int, default=1, help="processes of the started host")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--think", type=float, default=2.0, help="mean seconds between the calls of a session")
    parser.add_argument("--calls", type=int, default=40, help="calls of one session, which is then replaced by another")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for one call, retries included")
    parser.add_argument("--echo", type=int, default=3, help="rounds of comparison with a bare echo server; 0: none")
    parser.add_argument("--otlp_endpoint", help="OpenTelemetry collector of the started host")
    parser.add_argument("--shell", type=float, default=0.0, help="share of calls that run a shell command")
    parser.add_argument("--kill", default="", help="comma-separated parts to kill under load: worker, redis")
    parser.add_argument("--kill_every", type=float, default=10.0, help="seconds between two kills")
    parser.add_argument("--concurrency", type=int, default=32, help="calls of one tool at a time in the started host")
    parser.add_argument("--queue", type=int, default=256, help="calls of one tool that may wait in the started host")
    flags = parser.parse_args(argv)
    kinds = list(filter(None, flags.kill.split(",")))
    if set(kinds) - set(chaos.KINDS):
        parser.error(f"--kill takes {', '.join(chaos.KINDS)}")
    if kinds and (not flags.offline_web or flags.workers < 2):
        parser.error("--kill needs --offline_web and --workers of at least 2")
    if bool(flags.address) == bool(flags.offline_web):
        parser.error("name either --address or --offline_web")
    token = os.environ.get(TOKEN_VARIABLE) or None
    try:
        with contextlib.ExitStack() as stack:
            redis = stack.enter_context(chaos.RedisServer()) if "redis" in kinds else None
            host = None
            if flags.offline_web:
                sizes = dict(workers=flags.workers, concurrency=flags.concurrency, queue=flags.queue)
                tools = "shell" if flags.shell else ""
                cache = redis.url if redis else None
                host = stack.enter_context(
                    ToolHost(
                        flags.offline_web,
                        token=token,
                        redis_url=cache,
                        tools=tools,
                        otlp_endpoint=flags.otlp_endpoint,
                        **sizes,
                    )
                )
            address = host.address if host else flags.address

            async def loaded() -> LoadReport:
                if flags.echo and not token:
                    await against_echo(address, rounds=flags.echo, pid=host.pid if host else None)
                client = ToolsClient(address, token=token, channels=4, call_timeout=flags.timeout)
                sizes = dict(sessions=flags.sessions, seconds=flags.seconds, think=flags.think, calls=flags.calls)
                killer = None
                if kinds:
                    killer = asyncio.create_task(
                        chaos.kill_parts(kinds, host.pid, redis, flags.kill_every, flags.seconds)
                    )
                pid = host.pid if host else None
                found = await run_load(client, **sizes, shell=flags.shell, seed=os.getpid(), pid=pid)
                if killer:
                    print(f"killed: {', '.join(await killer)}")
                await client.close()
                return found

            load = asyncio.run(loaded())
    except (ToolHostError, ToolInfraError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    print(format_report(load))
    return 0 if load.clean else 1


if __name__ == "__main__":
    sys.exit(main())
