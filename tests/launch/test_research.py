"""The research command as a person runs it: a scripted model behind a real endpoint, a real tool host."""

import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.tools_env.conftest import write_offline_web
from tools_env.process import ToolHost

ROOT = Path(__file__).resolve().parents[2]


class Model(http.server.BaseHTTPRequestHandler):
    """Searches first, then answers with the first citation id it was shown."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        last = body["messages"][-1]["content"]
        if last.startswith("<tool_response>"):
            found = re.search(r"\n(.*) \\cite\{(web_\w+)\}", last)
            text = f"<answer>{found[1]} \\cite{{{found[2]}}}</answer>"
        else:
            call = {"name": "batch_web_surfer", "arguments": {"queries": [last]}}
            text = f"<think>I search.</think>\n<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
        reply = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("research")
    with ToolHost(write_offline_web(folder / "world"), web_port=9, log_path=folder / "log") as host:
        yield host.address


def research(*words, **kwargs):
    command = [sys.executable, "-m", "launch.research", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize(("question", "fact"), [("capital of Austria", "Vienna"), ("奥地利的首都", "维也纳")])
def test_a_question_becomes_a_cited_page(question, fact, endpoint, address, tmp_path):
    done = research(
        question,
        f"--endpoint={endpoint}",
        "--model=scripted",
        f"--config.tools.address={address}",
        f"--out={tmp_path / 'out'}",
    )
    assert done.returncode == 0, done.stderr
    assert "1. calls" in done.stdout and "answered; 2 turns, 1 tool calls" in done.stdout
    assert str(tmp_path / "out" / "answer.md") in done.stdout
    markdown = (tmp_path / "out" / "answer.md").read_text()
    assert fact in markdown and "atlas.test" in markdown and "unresolved" not in markdown
    assert fact in (tmp_path / "out" / "answer.html").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["q"], "no trained checkpoint in"),
        (["q", "--endpoint=http://127.0.0.1:9"], "--endpoint needs --model=NAME"),
    ],
)
def test_what_cannot_be_asked_is_one_line(words, line, tmp_path):
    done = research(*words, f"--config.run_dir={tmp_path / 'nothing'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and line in done.stderr


def test_a_tool_host_that_is_not_there_is_one_line(endpoint):
    done = research(
        "q",
        f"--endpoint={endpoint}",
        "--model=m",
        "--config.tools.address=127.0.0.1:9",
        "--config.tools.call_timeout=1.0",
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "127.0.0.1:9" in done.stderr
