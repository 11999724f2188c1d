"""A tool host that someone else runs: with a token from the environment, over TLS when its authority is named."""

import asyncio

import pytest

from configs import miniature
from stepdr_jax.agent.tools import Tools
from stepdr_jax.errors import UserError
from tools_env.client import ToolInfraError
from tools_env.process import ToolHost


def remote(**fields):
    config = miniature.get_config().unlock()
    config.tools.update(fields)
    return config


def test_the_token_is_that_of_the_named_variable(offline_web, tmp_path, monkeypatch):
    async def names(config):
        tools = Tools.from_config(config, None)
        try:
            return [tool.name for tool in await (await tools.client()).list_tools()]
        finally:
            await tools.close()

    monkeypatch.setenv("OTHER_TOKEN", "right")
    monkeypatch.delenv("STEPDR_TOOLS_TOKEN", raising=False)
    with ToolHost(offline_web, web_port=9, token="right", log_path=tmp_path / "log") as host:
        assert asyncio.run(names(remote(address=host.address, token_env="OTHER_TOKEN")))
        with pytest.raises(ToolInfraError, match="UNAUTHENTICATED"):
            asyncio.run(names(remote(address=host.address)))


def test_a_missing_authority_is_one_line_that_names_the_field(tmp_path):
    with pytest.raises(UserError, match="tools.tls_ca: expected a PEM file, got .*nothing.pem"):
        Tools.from_config(remote(address="x:1", tls_ca=f"{tmp_path}/nothing.pem"), None)
