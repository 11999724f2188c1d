"""Child processes of the tools, which process untrusted input under limits of their own."""

import asyncio
from collections.abc import Mapping

from tools_env.errors import ToolError


async def run_child(
    command: list[str], content: bytes, seconds: float, environment: Mapping[str, str], too_slow: str
) -> tuple[int, bytes]:
    """Runs a program with `content` as its standard input; returns (exit status, standard output).

    Raises ToolError(too_slow) after `seconds`, when the process is killed.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
    )
    try:
        async with asyncio.timeout(max(seconds, 0.1)):
            out, _ = await process.communicate(content)
    except TimeoutError:
        raise ToolError(too_slow) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, out
