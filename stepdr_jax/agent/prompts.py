"""What the agent is told: system prompts, and the few sentences that the episode loop itself says to the policy.

`compact` is for tiny models that learn the tools from their training data. `full` states the rules of answering and
citing and describes every tool by JSON Schema in the layout of Qwen2.5's chat template. Both name the current date.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepdr_jax.errors import UserError
from stepdr_jax.records import Lang

if TYPE_CHECKING:
    from tools_env.client import ToolSpec

STYLES = ("compact", "full")

COMPACT = {
    "en": "You are a research agent. Today is {as_of}.",
    "zh": "你是研究智能体。今天是{as_of}。",
}

# Layout of the tool section: Qwen2.5's chat template (tokenizer_config.json of Qwen/Qwen2.5-32B-Instruct).
TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

RULES = {
    "en": """# How to work

- Think between <think> and </think>, then either call tools or answer. One turn holds calls or the answer, not both.
- Split the request into questions that one search can settle. Search before you claim; read the page when a passage is not enough.
- Prefer authoritative and recent sources, compare at least two when they may disagree, and correct yourself when a result contradicts you.
- Today is {as_of}: what is "current" or "latest" is decided by this date. Put a year into a query only when the request names one.
- Long tool results are stored; page through them with the file tool instead of asking again.
- Finish with the complete answer between <answer> and </answer>, in the language of the request. After every statement taken from a source put \\cite{{id}} with the id shown beside the passage. Never cite an id you were not shown. Say so when the sources do not settle a point.""",  # noqa: E501 (the model reads these lines)
    "zh": """# 工作方式

- 在 <think> 与 </think> 之间思考，然后调用工具或作答；同一轮只能二选一。
- 把请求拆成一次搜索就能解决的问题。先搜索再下结论；片段不够时打开网页阅读。
- 优先采用权威、较新的来源；来源可能不一致时至少对照两个；结果与判断矛盾时纠正自己。
- 今天是{as_of}：“目前”“最新”以此日期为准。请求没有提到年份时，不要在查询里加年份。
- 过长的工具结果会被保存；用 file 工具翻页阅读，不要重复请求。
- 最后在 <answer> 与 </answer> 之间用请求的语言给出完整回答。每个来自来源的陈述后写 \\cite{{编号}}，编号是片段旁显示的编号；不要引用没有显示过的编号。来源不能确定的地方要说明。""",  # noqa: E501
}

ANSWER_NOW = {"en": "Answer now.", "zh": "现在回答。"}

FORMAT_ERROR = {
    "en": 'Format error: {error}. Write <tool_call>\n{{"name": "...", "arguments": {{}}}}\n</tool_call> '
    "or <answer>...</answer>.",
    "zh": '格式错误：{error}。请写 <tool_call>\n{{"name": "...", "arguments": {{}}}}\n</tool_call> '
    "或 <answer>...</answer>。",
}

CUT_TURN = {"en": "the turn was cut at {tokens} tokens, be shorter", "zh": "这一轮在{tokens}个词元处被截断，请写短一些"}


def system_prompt(style: str, as_of: str, tool_specs: Sequence["ToolSpec"] = (), lang: Lang = "en") -> str:
    """Returns the system message.

    Args:
        style: "compact" or "full"; anything else is a UserError.
        as_of: the ISO date the agent is told.
        tool_specs: the tool host's tools; used by "full" only.
        lang: language of the request.
    """
    if style not in STYLES:
        raise UserError(f"agent.prompt: expected one of {', '.join(STYLES)}, got {style!r}; change it in the config")
    opening = COMPACT[lang].format(as_of=as_of)
    if style == "compact":
        return opening
    functions = [{"name": spec.name, "description": spec.description, "parameters": spec.schema} for spec in tool_specs]
    return "\n\n".join([opening, RULES[lang].format(as_of=as_of), tool_section(functions)])


def tool_section(functions: Sequence[dict]) -> str:
    """Returns the part of a system message that describes functions: {"name", "description", "parameters"} each."""
    signatures = (json.dumps({"type": "function", "function": f}, ensure_ascii=False) for f in functions)
    return TOOLS.format(signatures="\n".join(signatures))
