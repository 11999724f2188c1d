"""One built world for all tests of this room, and its web."""

import json
from pathlib import Path

import pytest

from tools_env.offline_web.build import build_offline_web
from tools_env.offline_web.facts import load_facts
from tools_env.offline_web.server import OfflineWebServer


@pytest.fixture(scope="session")
def facts():
    return load_facts()


@pytest.fixture(scope="session")
def offline_web_dir(tmp_path_factory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("run") / "world"
    build_offline_web(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def documents(offline_web_dir) -> dict[str, dict]:
    rows = [json.loads(line) for line in (offline_web_dir / "documents.jsonl").read_text().splitlines()]
    return {row["url"]: row for row in rows}


@pytest.fixture(scope="session")
def web_port(offline_web_dir):
    with OfflineWebServer(offline_web_dir) as port:
        yield port
