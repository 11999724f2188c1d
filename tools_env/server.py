"""Command line of the tool host: serves the research tools over gRPC until it is stopped.

python -m tools_env.server --offline_web=DIR --port=0 --port_file=PATH
python -m tools_env.server --offline_web=DIR --workers=4 --state_dir=DIR    several processes; restarts keep sessions
python -m tools_env.server --offline_web=DIR --mcp                          for a client of the Model Context Protocol
"""

import argparse
import asyncio
import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path

from tools_env.errors import ToolHostError
from tools_env.service import workers
from tools_env.service.auth import check_exposure
from tools_env.service.host import start_host
from tools_env.service.settings import TOKEN_VARIABLE, HostSettings

logger = logging.getLogger(__name__)


def run_host(settings: HostSettings, *, port_file: str | None = None, stop_with_stdin: bool = False) -> None:
    """Serves until SIGTERM or SIGINT (or the end of standard input), then drains. Raises ToolHostError."""
    asyncio.run(_run_until_stopped(settings, port_file, stop_with_stdin))


async def _run_until_stopped(settings: HostSettings, port_file: str | None, stop_with_stdin: bool) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    watcher = asyncio.create_task(_watch_stdin(stopped)) if stop_with_stdin else None
    if settings.workers > 1 and settings.socket_dir is None:
        check_exposure(settings.host, settings.token, settings.tls_client_ca, settings.allow_anyone)
        await workers.run_workers(settings, lambda address: _announce(address, port_file), stopped.wait())
    else:
        host = await start_host(settings)
        _announce(host.address, port_file)
        await stopped.wait()
        logger.info("draining")
        await host.stop()
    if watcher is not None:
        watcher.cancel()


def _announce(address: str, port_file: str | None) -> None:
    if port_file:
        path = Path(port_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(address + "\n")
        os.replace(temporary, path)
    print(address, flush=True)


async def _watch_stdin(stopped: asyncio.Event) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    stopped.set()


def parse_flags(argv: list[str] | None = None) -> tuple[HostSettings, argparse.Namespace]:
    """Returns the settings (flags, and the token's environment variable) and the other flags.

    The other flags are port_file (str or None), mcp and stop_with_stdin (bool). Raises ToolHostError.
    """
    parser = argparse.ArgumentParser(
        prog="serve_tools",
        description="Serves the research tools over gRPC.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    fields = [field for field in dataclasses.fields(HostSettings) if field.name != "token"]
    for field in fields:
        flag = f"--{field.name}"
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=field.metadata["help"])
            continue
        kind = int if field.type in (int, int | None) else float if field.type is float else str
        parser.add_argument(flag, type=kind, default=field.default, help=field.metadata["help"])
    parser.add_argument("--port_file", help="file that is written with host:port when the host answers calls")
    parser.add_argument(
        "--mcp",
        action="store_true",
        help="speak the Model Context Protocol on standard input and output instead of gRPC",
    )
    parser.add_argument("--stop_with_stdin", action="store_true", help="stop when standard input ends")
    flags = parser.parse_args(argv)
    settings = {field.name: vars(flags).pop(field.name) for field in fields}
    return HostSettings(**settings, token=os.environ.get(TOKEN_VARIABLE) or None), flags


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Exit status 2: the message on standard error names what to change."""
    try:
        settings, flags = parse_flags(argv)
        # With --mcp, standard output belongs to the protocol and few clients show standard error.
        level = logging.WARNING if flags.mcp else logging.INFO
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        if flags.mcp:
            from tools_env.adapters import mcp

            asyncio.run(mcp.serve_mcp(settings))
        else:
            run_host(settings, port_file=flags.port_file, stop_with_stdin=flags.stop_with_stdin)
    except ToolHostError as error:
        print(f"tool host: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
