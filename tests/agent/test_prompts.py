"""What the agent is told."""

import json
import re

import pytest

from stepdr_jax.agent import prompts
from stepdr_jax.errors import UserError
from tools_env.client import ToolSpec

SPEC = ToolSpec("todo", "Keeps the list of steps.", {"type": "object", "properties": {"items": {"type": "array"}}})


def test_compact_prompts_are_exact():
    assert prompts.system_prompt("compact", "2026-06-01", [], "en") == "You are a research agent. Today is 2026-06-01."
    assert prompts.system_prompt("compact", "2026-06-01", [], "zh") == "你是研究智能体。今天是2026-06-01。"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_full_prompt_holds_date_rules_and_every_schema(lang):
    text = prompts.system_prompt("full", "2026-06-01", [SPEC], lang)
    assert "2026-06-01" in text and "\\cite{" in text and "<answer>" in text
    tools = re.search(r"<tools>\n(.*?)\n</tools>", text, re.S).group(1).splitlines()
    assert [json.loads(line)["function"]["parameters"] for line in tools] == [SPEC.schema]
    assert '{"name": <function-name>, "arguments": <args-json-object>}' in text


def test_an_unknown_style_names_the_field_and_the_choices():
    with pytest.raises(UserError, match="agent.prompt.*compact, full.*'long'"):
        prompts.system_prompt("long", "2026-06-01", [], "en")
