"""What the viewer embeds: segments, citations, tokens, bounds, and text that cannot break out."""

import base64
import json
import zlib

import pytest

from stepdr_jax.pages.render import embed_json, pack_json
from stepdr_jax.records import Task
from stepdr_jax.reporting import viewer
from stepdr_jax.tokens.tokenizer import Tokenizer
from tests.reporting import synthetic_run


def test_segments_of_a_turn():
    turn = "<think>I look.</think>\n<tool_call>\n{}\n</tool_call>\n<answer>Yes.</answer> tail"
    assert viewer.split_segments(turn) == [("thought", "I look."), ("call", "{}"), ("answer", "Yes."), ("text", "tail")]


def test_segments_of_a_cut_turn_run_to_the_end():
    assert viewer.split_segments("so <answer>The capital") == [("text", "so"), ("answer", "The capital")]


def test_cited_ids_in_order_once():
    assert viewer.distinct_citations("a \\cite{web_b} b \\cite{web_a, web_b} \\cite{}") == ["web_b", "web_a"]


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--", "]]>", "\u2028 & <"])
def test_embedded_json_cannot_end_its_element_and_reads_back(text):
    embedded = embed_json({"text": text})
    assert not set("<>&\u2028\u2029") & set(embedded)
    assert json.loads(embedded) == {"text": text}


def test_vocabulary_is_text_where_tokens_are_whole_characters_and_bytes_where_not():
    tokenizer = Tokenizer.train(["plain words only"], 300)
    ids = [*tokenizer.encode("a 奥"), tokenizer.im_end, 9999]
    known = viewer.token_texts(ids, tokenizer.piece)
    assert known[str(tokenizer.im_end)] == "<|im_end|>" and known["9999"] == "\ufffd"
    assert [known[str(id_)] for id_ in ids[-5:-2]] == [[0xE5], [0xA5], [0xA5]]
    assert b"".join(map(tokenizer.piece, ids[:-2])).decode() == "a 奥"


def test_token_detail_keeps_numbers_of_sampled_tokens_only():
    detail = viewer.token_detail(
        [97, 98, 99, 100],
        [False, True, True, False],
        {"value": [9.0, 1.0, float("nan"), 9.0], "trainer": [1.0]},
        [0, 3, 3, 0],
    )
    assert detail == {"ids": [97, 98, 99, 100], "runs": [1, 2, 1], "value": [1.0, None], "version": [3, 3]}


def test_runs_begin_with_given_tokens_also_where_there_are_none():
    assert viewer.token_detail([1, 2], [True, False], {})["runs"] == [0, 1, 1]
    assert viewer.token_detail([], [], {})["runs"] == [0]


def test_packed_json_reads_back():
    raw = base64.b64decode(pack_json({"a": "奥</script>"}))
    assert json.loads(zlib.decompress(raw, -zlib.MAX_WBITS)) == {"a": "奥</script>"}


def test_episode_outcomes():
    task = synthetic_run.make_tasks(1)[0]
    good = viewer.episode_row(*synthetic_run.make_episode(task, True), where="w", seed=0, task=task)
    bad = viewer.episode_row(*synthetic_run.make_episode(task, False), where="w", seed=0, task=task)
    masked = viewer.episode_row(*synthetic_run.failed_episode(task), where="w", seed=0, task=task, missing="gone")
    assert (good["outcome"], bad["outcome"], masked["outcome"]) == ("correct", "wrong", "masked")
    assert list(good["sources"]) == ["web_bakotefi"]


def test_rubric_criteria_stand_beside_their_verdicts():
    task = Task(id="task000", kind="fact", lang="en", query="?")
    row = viewer.episode_row(
        *synthetic_run.make_episode(task, True),
        where="w",
        seed=0,
        task=task,
        rubric_set=synthetic_run.rubric_set(task),
    )
    assert row["rubrics"][0][:5] == ["a", "States the capital.", 3.0, "explicit", "satisfied"]
    assert [rubric[7] for rubric in row["rubrics"]] == [False, False, False]


def test_choose_is_fair_between_groups_and_bounded():
    groups = [[{"t": "x" * 100}] * 50, [{"t": "y" * 100}] * 2]
    chosen = viewer.take_in_turn(groups, max_bytes=1200)
    assert sum(row["t"][0] == "y" for row in chosen) == 2
    assert len(json.dumps(chosen)) <= 1300


def test_spread_shows_every_kind_first():
    assert viewer.stratify(["a1", "a2", "a3", "b1", "c1"], lambda row: row[0])[:3] == ["a1", "b1", "c1"]
