"""Facts about public source formats: on real samples where there are some, else on small files of that format."""

import bz2
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from stepdr_jax.data import sources
from stepdr_jax.errors import UserError
from stepdr_jax.records import Trajectory
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
 <siteinfo><sitename>Wikipedia</sitename><base>https://en.wikipedia.org/wiki/Main_Page</base></siteinfo>
 <page><title>Alan Turing</title><ns>0</ns><id>1208</id><revision><id>5</id><text xml:space="preserve">{{Infobox person
| name = Alan {{nowrap|Turing}}
}}
'''Alan Turing'''&lt;ref name="a"&gt;{{cite web|x}}&lt;/ref&gt; was a [[mathematician]] of the [[United Kingdom|British]] Isles.&lt;ref name="b" /&gt;
[[File:Turing.jpg|thumb|A [[statue]] of him]]
== Work ==
* He wrote [https://example.org a paper] &amp;nbsp;in 1936.
{| class="wikitable"
| cell
|}
[[Category:Mathematicians]]</text></revision></page>
 <page><title>A. Turing</title><ns>0</ns><id>2</id><redirect title="Alan Turing" /><revision><text>#REDIRECT [[Alan Turing]]</text></revision></page>
 <page><title>Talk:Alan Turing</title><ns>1</ns><id>3</id><revision><text>Chat</text></revision></page>
 <page><title>Empty</title><ns>0</ns><id>4</id><revision><text>{{stub}}</text></revision></page>
</mediawiki>"""


def read(path: Path, format_: str, size: int = 1 << 30, **fields) -> list:
    """Every row (or None, or ValueError) of a file, read part by part; good rows are read again by their keys."""
    source = sources.DataSource("mine", format_, (path,), **(dict(component="c") | fields))
    rows = []
    for part in source.parts(path, size):
        scanned = list(source.scan(path, part))
        good = [key for key, row, _ in scanned if isinstance(row, dict)]
        assert list(source.pick(path, part, good)) == [row for _, row, _ in scanned if isinstance(row, dict)]
        rows += [row for _, row, _ in scanned]
    return rows


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def need(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"../shared/data/{name} is absent")
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_wikipedia_dump_gives_the_prose_of_its_articles_with_their_addresses(tmp_path, packed):
    path = tmp_path / ("dump.xml.bz2" if packed else "dump.xml")
    path.write_bytes(bz2.compress(DUMP.encode()) if packed else DUMP.encode())
    article, redirect, talk, empty = read(path, "wikipedia")
    assert redirect is None and talk is None
    assert "'Empty' has no text" in str(empty)
    assert article["text"] == (
        "Alan Turing\n\nAlan Turing was a mathematician of the British Isles.\n\n\nWork\n\n"
        "He wrote a paper \xa0in 1936."
    ).replace("\n\n\n", "\n\n")
    assert article["provenance"] == "https://en.wikipedia.org/wiki/Alan_Turing"
    assert article["id"] == "wikipedia/en/1208"
    assert article["license"] == "CC-BY-SA-4.0" and article["lang"] == "en"


def test_a_damaged_dump_gives_what_stands_before_the_damage_and_names_the_place(tmp_path):
    path = tmp_path / "dump.xml"
    path.write_text(DUMP[: DUMP.index("Talk:")])
    rows = read(path, "wikipedia")
    assert isinstance(rows[0], dict) and "damaged from page 2 on" in str(rows[-1])


def test_a_baike_entry_gives_title_summary_and_sections(tmp_path):
    entry = dict(title="维也纳", summary="奥地利首都。", sections=[dict(title="历史", content="始于罗马。")])
    (row,) = read(lines(tmp_path / "b.jsonl", [entry | dict(url="https://b.example/1")]), "baike", license="unknown")
    assert row["text"] == "维也纳\n\n奥地利首都。\n\n历史\n始于罗马。"
    assert row["lang"] == "zh" and row["provenance"] == "https://b.example/1" and row["license"] == "unknown"


def test_papers_of_three_publishers_are_read(tmp_path):
    body = "Deep Nets\nWe show."
    s2orc = dict(
        corpusid=7,
        content=dict(
            source=dict(oainfo=dict(license="CCBY", openaccessurl="https://p.example/7")),
            text=body,
            annotations=dict(title=json.dumps([dict(start=0, end=9)])),
        ),
    )
    older = dict(paper_id="9", title="Old Nets", abstract=[dict(text="We say.")])
    older["pdf_parse"] = dict(body_text=[dict(section="Intro", text="One."), dict(section="Intro", text="Two.")])
    arxiv = dict(id="0704.0001", title="A\n  title", abstract="  An abstract.\n", categories="hep-ph", license="arxiv")
    rows = read(lines(tmp_path / "p.jsonl", [s2orc, older, arxiv, dict(text="Plain.")]), "papers")
    assert [row["text"] for row in rows] == [
        body,
        "Old Nets\n\nWe say.\n\nIntro\n\nOne.\nTwo.",
        "A\n  title\n\nAn abstract.",
        "Plain.",
    ]
    assert rows[0]["license"] == "CCBY" and rows[0]["provenance"] == "https://p.example/7"
    assert rows[2]["provenance"] == "https://arxiv.org/abs/0704.0001" and rows[3]["provenance"] == "p.jsonl:" + str(
        sum(len(json.dumps(row)) + 1 for row in (s2orc, older, arxiv))
    )


def test_synth_tables_are_read_by_row_groups_with_the_license_of_their_seeds(tmp_path):
    row = dict(synth_id="s", language="en", exercise="memorization", query="Q", query_seed_url="https://w.example/Q")
    row |= dict(seed_license="CC-By-SA (4.0)", synthetic_reasoning="So.", synthetic_answer="A")
    table = [row | dict(synth_id=f"s{i}", query=f"Q{i}") for i in range(10)] + [row | dict(synthetic_answer="")]
    path = tmp_path / "synth.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=3)
    rows = read(path, "synth", size=path.stat().st_size // 2)
    assert len(sources.DataSource("m", "synth", (path,), "c").parts(path, path.stat().st_size // 2)) > 1
    assert [row["prompt"] for row in rows[:10]] == [f"Q{i}" for i in range(10)]
    assert rows[0]["completion"] == "<think>\nSo.\n</think>\nA" and rows[0]["loss"] == "completion"
    assert rows[0]["license"] == "CC-By-SA (4.0)" and rows[0]["provenance"] == "https://w.example/Q"
    assert "synthetic_answer" in str(rows[10])
    path.write_bytes(path.read_bytes()[:-20])
    assert "damaged" in str(read(path, "synth")[0])


def test_real_trajectories_of_the_agent_data_protocol_become_episodes_of_the_chat_format():
    folder, tokenizer = need("adp_samples"), need("qwen_tokenizer/tokenizer.json")
    tok = Tokenizer.load(tokenizer)
    count = 0
    for path in sorted(folder.glob("*_std.json")):
        for raw, row in zip(json.loads(path.read_text()), read(path, "adp_json", license="see source"), strict=True):
            count += 1
            trajectory = Trajectory.model_validate(row["trajectory"])
            log = chat.trajectory_tokens(tok, trajectory).arrays()
            shown = tok.decode(log["tokens"].tolist(), special=True)
            written = tok.decode(log["tokens"][log["sampled"]].tolist(), special=True)
            for step in raw["content"]:
                if step["class_"] == "api_action":
                    assert f'{{"name": "{step["function"]}"' in written
                if step["class_"] == "message_action":
                    assert step["content"] in written
                if step["class_"] == "text_observation":
                    assert step["content"] in shown and (len(step["content"]) < 40 or step["content"] not in written)
            assert row["license"] == "see source" and row["provenance"].startswith(path.name)
    assert count == 17


def test_what_follows_a_call_is_its_result_and_what_follows_a_message_is_a_person():
    folder = need("adp_samples")
    row = read(folder / "agenttuning_kg_sample_std.json", "adp_json")[0]
    roles = [message["role"] for message in row["trajectory"]["messages"]]
    assert roles[:6] == ["user", "assistant", "user", "assistant", "tool", "assistant"]
    assert row["trajectory"]["messages"][1]["train"] is False  # the data put this into the agent's mouth


def test_real_questions_with_their_pages_are_read_and_the_one_without_a_page_is_named():
    rows = read(need("webshaper") / "webshaper.500.jsonl", "url_qa", license="MIT")
    good = [row for row in rows if isinstance(row, dict)]
    assert len(good) == 499 and "one URL or more" in str([row for row in rows if not isinstance(row, dict)][0])
    assert good[0]["completion"] == "12,000" and good[0]["prompt"].startswith("https://www.transfermarkt.com/")
    assert {row["license"] for row in good} == {"MIT"} and {row["lang"] for row in good} <= {"en", "zh"}


def test_dialogue_of_both_forms_and_its_switches(tmp_path):
    share = dict(
        id="s", system="Be kind.", conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    )
    call = {"function": {"name": "look", "arguments": '{"q": 1}'}}
    said = [
        ("user", "Hi"),
        ("assistant", "No"),
        ("user", "Again"),
        ("assistant", None),
        ("tool", "x"),
        ("assistant", "Yes"),
    ]
    messages = [dict(role=role, content=content) for role, content in said]
    messages[1]["train"] = False
    messages[3]["tool_calls"] = [call]
    first, second = read(lines(tmp_path / "d.jsonl", [share, dict(messages=messages)]), "dialogue")
    assert [m["role"] for m in first["trajectory"]["messages"]] == ["system", "user", "assistant"]
    second = Trajectory.model_validate(second["trajectory"])
    assert [m.train for m in second.messages] == [True, False, True, True, True, True]
    assert second.messages[3].content == chat.tool_call_text("look", {"q": 1})
    assert second.id == Trajectory.model_validate(read(tmp_path / "d.jsonl", "dialogue")[1]["trajectory"]).id


def test_a_message_taken_out_of_the_loss_is_shown_and_not_learned(tmp_path):
    tok = Tokenizer.train(["Hi No Again Yes"], 300)
    turns = [("user", "Hi"), ("assistant", "No"), ("user", "Again"), ("assistant", "Yes")]
    messages = [dict(role=role, content=content) for role, content in turns]
    messages[1]["weight"] = 0
    (row,) = read(lines(tmp_path / "d.jsonl", [dict(messages=messages)]), "jsonl")
    log = chat.trajectory_tokens(tok, Trajectory.model_validate(row["trajectory"])).arrays()
    assert "No<|im_end|>" in tok.decode(log["tokens"].tolist(), special=True)
    assert tok.decode(log["tokens"][log["sampled"]].tolist(), special=True) == "Yes<|im_end|>"


BAD = [
    ([], "expected a JSON object, got list"),
    ({"prompt": "x"}, "expected a field text, or prompt and completion, or messages"),
    ({"text": "  "}, "field 'text' is empty"),
    ({"text": 3}, "field 'text': expected text, got int"),
    ({"prompt": "x", "completion": "y", "loss": "some"}, "loss all or completion"),
    ({"messages": []}, "a list of turns"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "turn 1: expected a role"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "no user message before it"),
]


@pytest.mark.parametrize("row, words", BAD)
def test_a_bad_row_of_ones_own_says_what_was_expected(tmp_path, row, words):
    good = {"text": "fine", "id": 5, "language": "fr", "license": "CC0", "url": "https://x.example"}
    broken, fine = read(lines(tmp_path / "mine.jsonl", [row, good]), "jsonl")
    assert words in str(broken)
    assert fine == dict(id="5", lang="fr", license="CC0", provenance="https://x.example", text="fine") | dict(
        components=["c"], capability=""
    )


def test_lines_that_are_no_json_and_bytes_that_are_no_text_are_named_and_passed_over(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"text": "one"}\nno\n\xff\xfe\n\n{"text": "two"}\n{"te')
    rows = read(path, "jsonl")
    assert [row["text"] for row in rows if isinstance(row, dict)] == ["one", "two"]
    assert len(rows) == 5 and "incomplete" in str(rows[-1])


def test_a_last_line_without_its_newline_counts(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"text": "one"}')
    assert read(tmp_path / "mine.jsonl", "jsonl")[0]["text"] == "one"


def test_parts_of_a_file_hold_every_line_once_however_it_is_cut(tmp_path):
    rng = np.random.default_rng(0)
    texts = [f"{i} " + "x" * int(rng.integers(0, 60)) for i in range(200)]
    path = lines(tmp_path / "mine.jsonl", [dict(text=text) for text in texts])
    for size in (17, 100, 999, 1 << 20):
        assert [row["text"] for row in read(path, "jsonl", size=size)] == texts
    with gzip.open(tmp_path / "mine.jsonl.gz", "wb") as out:
        out.write(path.read_bytes())
    assert [row["text"] for row in read(tmp_path / "mine.jsonl.gz", "jsonl", size=17)] == texts


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "page.txt").write_text("第一行\n奥地利的首都")
    (row,) = read(tmp_path / "page.txt", "text")
    assert row["text"] == "第一行\n奥地利的首都" and row["lang"] == "zh" and row["provenance"] == "page.txt"


@pytest.mark.parametrize(
    "entry, words",
    [
        (dict(format="csv"), r"mine.format: expected one of jsonl, .* got 'csv'"),
        (dict(format="jsonl", path="/nowhere/*.jsonl", component="c"), "no file matches '/nowhere"),
        (dict(format="jsonl", path=__file__), "mine.component: expected the mixture component"),
        (
            dict(format="jsonl", path=__file__, component="c", weight=1),
            "unknown field 'weight'; allowed fields: format",
        ),
    ],
)
def test_a_wrong_entry_of_the_config_names_its_field(tmp_path, entry, words):
    config = ConfigDict(dict(run_dir=str(tmp_path), data=dict(sources={"mine": entry})))
    with pytest.raises(UserError, match=words):
        sources.list_sources(config)
