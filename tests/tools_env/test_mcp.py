"""Facts about the MCP face, seen by the official client over standard input and output."""

import asyncio
import sys
from pathlib import Path

import pytest

mcp = pytest.importorskip("mcp")
ROOT = Path(__file__).resolve().parents[2]


def test_an_mcp_client_lists_and_calls_the_same_tools(offline_web):
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    async def main():
        command = ["-m", "tools_env.server", "--mcp", f"--offline_web={offline_web}", "--web_port=9"]
        server = StdioServerParameters(command=sys.executable, args=command, cwd=str(ROOT))
        async with stdio_client(server) as streams, ClientSession(*streams) as client:
            await client.initialize()
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert list(tools) == ["batch_web_surfer", "file", "todo"]
            assert tools["file"].input_schema["required"] == ["op"]
            found = await client.call_tool("batch_web_surfer", {"queries": ["capital of Austria"]})
            assert not found.is_error and "Vienna" in found.content[0].text
            (first, *_) = found.meta["stepdr.tools/v1"]["sources"]
            assert f"\\cite{{{first['id']}}}" in found.content[0].text
            await client.call_tool("file", {"op": "write", "path": "a.md", "content": "奥地利"})
            read = await client.call_tool("file", {"op": "read", "path": "a.md"})
            assert read.content[0].text == "奥地利"
            wrong = await client.call_tool("file", {"op": "erase"})
            assert wrong.is_error and wrong.content[0].text.startswith("op must be one of")
            assert wrong.meta["stepdr.tools/v1"]["outcome"] == "bad_arguments"

    asyncio.run(asyncio.wait_for(main(), 60))


def test_setting_that_cannot_work_is_one_line_on_stderr(tmp_path, capsys):
    from tools_env.server import main

    assert main(["--mcp", f"--offline_web={tmp_path}"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("tool host: ") and told.err.count("\n") == 1
