"""The page of a cited answer."""

import pytest

from stepdr_jax.records import Finish
from stepdr_jax.reporting import research_page
from tests.reporting import synthetic_run

TASK = synthetic_run.make_tasks(1)[0]


def test_markdown_numbers_citations_and_lists_their_sources():
    trajectory, _ = synthetic_run.make_episode(TASK, True)
    text = research_page.render_markdown(trajectory, TASK.query)
    assert text.startswith(f"# {TASK.query}\n\nThe capital of Landia0 is Town0. [1]\n")
    assert "1. [Landia0](http://atlas.test/en/landia0), 2025-03-01, authority: authoritative (`web_bakotefi`)" in text
    assert "> The capital of Landia0 is Town0." in text
    assert "searched: capital of Landia0" in text


def test_unresolved_citations_are_shown_as_such():
    trajectory, _ = synthetic_run.make_episode(TASK, False)
    assert "[2, unresolved]" in research_page.render_markdown(trajectory, "q")
    page = research_page.render_html(trajectory, "q")
    assert 'class="mark lost"' in page and "web_lostlost: unresolved" in page


def test_html_escapes_everything_from_the_episode():
    trajectory, _ = synthetic_run.make_episode(TASK, True, hostile=True)
    trajectory.answer = f"{synthetic_run.HOSTILE} \\cite{{web_bakotefi}}"
    page = research_page.render_html(trajectory, synthetic_run.HOSTILE)
    assert "<img" not in page and "<b>bold" not in page and "<script" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("url", ["javascript:alert(1)", "data:text/html,x"])
def test_only_http_sources_are_links(url):
    trajectory, _ = synthetic_run.make_episode(TASK, True)
    trajectory.messages[3].sources[0].url = url
    assert f'href="{url}' not in research_page.render_html(trajectory, "q")
    assert f"]({url}" not in research_page.render_markdown(trajectory, "q")


def test_no_answer_says_why():
    trajectory, _ = synthetic_run.make_episode(TASK, True)
    trajectory.answer, trajectory.finish = None, Finish.BUDGET
    assert "the limit of tool calls was reached" in research_page.render_markdown(trajectory, "q")
    assert "the limit of tool calls was reached" in research_page.render_html(trajectory, "q")


def test_chinese_question():
    trajectory, _ = synthetic_run.make_episode(TASK, True)
    assert '<html lang="zh">' in research_page.render_html(trajectory, "奥地利的首都是哪里？")
