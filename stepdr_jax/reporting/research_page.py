"""A cited answer as Markdown and as one self-contained HTML file.

Citations become numbered notes. A citation of no passage of the episode is shown as unresolved, never hidden. All text
from the episode is untrusted: it is escaped in HTML, and in Markdown link text it loses the characters that could forge
markup.
"""

import html
import re
from urllib.parse import urlsplit

import markupsafe

from stepdr_jax.pages.render import render_page
from stepdr_jax.records import Finish, ObservedSource, Trajectory
from stepdr_jax.reporting.viewer import distinct_citations, split_segments
from stepdr_jax.text.citations import CITATION
from stepdr_jax.text.scripts import question_language

AUTHORITY = {0: "unknown or unreliable", 1: "ordinary", 2: "authoritative"}
ENDINGS = {
    Finish.MAX_TURNS: "the limit of turns was reached",
    Finish.MAX_TOKENS: "the limit of tokens was reached",
    Finish.BUDGET: "the limit of tool calls was reached",
    Finish.FORMAT: "the last turn was neither a tool call nor an answer",
    Finish.WALL_CLOCK: "the time limit was reached",
    Finish.INFRA_FAILED: "the tool host or the model failed",
    Finish.CANCELLED: "it was cancelled",
}


def render_markdown(trajectory: Trajectory, query: str) -> str:
    """The answer with numbered citations, its sources and the searches that led to them, as Markdown."""
    numbers, sources = _numbers(trajectory), trajectory.sources()
    lines = [f"# {_one_line(query)}", ""]
    if trajectory.answer:
        lines += [CITATION.sub(lambda match: _marks(match[1], numbers, sources), trajectory.answer).strip(), ""]
    else:
        lines += [f"*{_no_answer(trajectory)}*", ""]
    if numbers:
        lines += ["## Sources", ""]
        for id_, number in numbers.items():
            source = sources.get(id_)
            if source is None:
                lines.append(f"{number}. `{id_}`: **unresolved**, no such passage was shown in this episode")
                continue
            title = re.sub(r"[\[\]\\]", "", _one_line(source.title or source.url))
            link = f"[{title}]({_markdown_url(source.url)})" if _is_web(source) else title
            lines.append(f"{number}. {link}, {_details(source)} (`{id_}`)  ")
            lines += [f"   > {line}" for line in source.text.strip().splitlines()]
        lines.append("")
    searches = _searches(trajectory)
    if searches:
        lines += ["## Steps", "", *(f"- {_one_line(text)}" for text in searches), ""]
    lines += ["---", "", _footer(trajectory), ""]
    return "\n".join(lines)


def render_html(trajectory: Trajectory, query: str) -> str:
    """The same as one HTML file that opens offline; sources link to their pages only when they are http(s)."""
    numbers, sources = _numbers(trajectory), trajectory.sources()
    notes = []
    for id_, number in numbers.items():
        source = sources.get(id_)
        notes.append(
            dict(
                number=number,
                id=id_,
                source=source,
                link=source.url if source and _is_web(source) else None,
                details=_details(source) if source else "",
            )
        )
    context = dict(
        query=query,
        lang=question_language(query),
        paragraphs=_paragraphs(trajectory.answer or "", numbers, sources),
        no_answer="" if trajectory.answer else _no_answer(trajectory),
        notes=notes,
        steps=_steps(trajectory),
        footer=_footer(trajectory),
    )
    return render_page("research.html.j2", context, styles=["style.css", "research.css"])


def _numbers(trajectory: Trajectory) -> dict[str, int]:
    return {id_: number for number, id_ in enumerate(distinct_citations(trajectory.answer), 1)}


def _marks(ids: str, numbers: dict[str, int], sources: dict[str, ObservedSource]) -> str:
    marks = [f"[{numbers[i]}]" if i in sources else f"[{numbers[i]}, unresolved]" for i in _split(ids)]
    return "".join(marks)


def _split(ids: str) -> list[str]:
    return [part.strip() for part in ids.split(",") if part.strip()]


def _paragraphs(answer: str, numbers: dict[str, int], sources: dict[str, ObservedSource]) -> list[markupsafe.Markup]:
    """Escaped paragraphs with citation marks that link to their notes."""

    def mark(ids: str) -> str:
        return "".join(
            f'<a class="mark{"" if i in sources else " lost"}" href="#source-{numbers[i]}">{numbers[i]}</a>'
            for i in _split(ids)
        )

    out = []
    for block in re.split(r"\n\s*\n", answer.strip()):
        parts, at = [], 0
        for match in CITATION.finditer(block):
            parts += [html.escape(block[at : match.start()].rstrip(" ")), mark(match[1])]
            at = match.end()
        parts.append(html.escape(block[at:]))
        out.append(markupsafe.Markup("".join(parts).replace("\n", "<br>")))
    return [block for block in out if block]


def _steps(trajectory: Trajectory) -> list[tuple[str, str]]:
    """(kind, text) of everything between question and answer."""
    out = []
    for message in trajectory.messages:
        if message.role == "assistant":
            out += [(kind, text) for kind, text in split_segments(message.content) if kind != "answer"]
        elif message.role == "tool":
            out.append(("observation", message.content))
    return out


def _searches(trajectory: Trajectory) -> list[str]:
    out = []
    for message in trajectory.messages:
        for call in message.tool_calls:
            wanted = call.arguments.get("queries") or call.arguments.get("urls")
            told = ", ".join(map(str, wanted)) if isinstance(wanted, list) else str(call.arguments)
            verb = (
                "searched" if call.arguments.get("queries") else "opened" if call.arguments.get("urls") else call.name
            )
            out.append(f"{verb}: {told}")
    return out


def _is_web(source: ObservedSource) -> bool:
    return urlsplit(source.url).scheme in ("http", "https")


def _details(source: ObservedSource) -> str:
    return ", ".join(
        [source.published_at or "no date", f"authority: {AUTHORITY.get(source.authority, str(source.authority))}"]
    )


def _no_answer(trajectory: Trajectory) -> str:
    cause = trajectory.metadata.get("cause")
    return f"No answer: {ENDINGS.get(trajectory.finish, str(trajectory.finish))}." + (f" {cause}" if cause else "")


def _footer(trajectory: Trajectory) -> str:
    stats = trajectory.stats
    parts = [f"Written by {trajectory.policy}"]
    for name, word in (("turns", "turns"), ("tool_calls", "tool calls"), ("sampled_tokens", "tokens sampled")):
        if name in stats:
            parts.append(f"{stats[name]:.0f} {word}")
    if "wall_seconds" in stats:
        parts.append(f"{stats['wall_seconds']:.1f} s")
    return ", ".join(parts) + ". Check the sources: a citation shows where a statement comes from, not that it is true."


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown_url(url: str) -> str:
    return re.sub(r"[\s<>()]", lambda match: f"%{ord(match[0]):02X}", url)
