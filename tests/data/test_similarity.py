"""Facts about duplicates and evaluation questions: what counts as the same, and what may not be trained on."""

import json
from pathlib import Path

import numpy as np
import pytest

from stepdr_jax.data import scan, selection, similarity, sources
from stepdr_jax.errors import UserError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
QUESTION = "Which Lloyd Webber musical premiered in the US on the 10th of December 1993?"  # 14 units
RIVER = (
    "The Danube rises in the Black Forest and flows through ten countries to the Black Sea, past Vienna and Budapest."
)


def sets(tmp_path, **rows) -> similarity.EvaluationSets:
    for name, pairs in rows.items():
        lines = (json.dumps(dict(question=question, answer=answer)) + "\n" for question, answer in pairs)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return similarity.read_evaluation_sets({name: str(tmp_path / f"{name}.jsonl") for name in rows})


def test_units_are_words_and_single_chinese_characters_without_case_width_and_punctuation():
    assert similarity.text_units("The Ｃapital, of 奥地利: Wien!") == ["the", "capital", "of", "奥", "地", "利", "wien"]


def test_a_question_is_found_in_any_case_and_punctuation_and_in_part(tmp_path):
    known = sets(tmp_path, trivia=[(QUESTION, "Sunset Boulevard")])
    find = lambda text: known.find(similarity.text_units(text))  # noqa: E731
    assert find(f"Quiz. {QUESTION.upper()} -- Sunset Boulevard.") == (0, True)
    assert find("In short: " + QUESTION.removeprefix("Which ")) == (0, False)  # 13 of its 14 units
    assert find("Which Lloyd Webber musical was it? " + RIVER) is None
    assert find("") is None


def test_a_short_question_tells_alone_from_eight_units_and_with_its_answer_from_four(tmp_path):
    known = sets(
        tmp_path, a=[("Who wrote the novel War and Peace?", ["Tolstoy"]), ("Who wrote Hamlet now?", "Shakespeare")]
    )
    find = lambda text: known.find(similarity.text_units(text))  # noqa: E731
    assert find("He asked: who wrote Hamlet now? Nobody said.") is None
    assert find("He asked: who wrote Hamlet now? Shakespeare, they said.") == (0, True)
    assert find("Who wrote the novel War and Peace? Someone.") is None  # seven units
    assert find("Who wrote the novel War and Peace? Leo Tolstoy.") == (0, True)


def test_chinese_questions_are_found(tmp_path):
    known = sets(tmp_path, zh=[("奥地利的首都在哪一条河的岸边？它有多少人口？", "多瑙河")])
    assert known.find(similarity.text_units("问：奥地利的首都在哪一条河的岸边,它有多少人口。答：多瑙河")) == (0, True)
    assert known.find(similarity.text_units("奥地利的首都是维也纳。")) is None


def test_the_real_format_of_triviaqa_is_read_and_its_aliases_are_answers():
    path = DATA / "triviaqa_sample" / "triviaqa_sample.json"
    if not path.exists():
        pytest.skip("../shared/data/triviaqa_sample is absent")
    known = similarity.read_evaluation_sets({"triviaqa": str(path)})
    question = json.loads(path.read_text())["Data"][0]["Question"]
    assert known.questions[0] >= 1
    assert known.find(similarity.text_units(f"{question} It was West Sunset Boulevard.")) == (0, True)


def test_an_absent_evaluation_set_is_named(tmp_path):
    with pytest.raises(UserError, match="evaluation_sets.frames: .*does not exist"):
        similarity.read_evaluation_sets({"frames": str(tmp_path / "frames.tsv")})


def test_near_duplicates_share_a_band_and_others_do_not():
    words = similarity.text_units(RIVER * 3)
    changed = similarity.text_units((RIVER * 3).replace("ten", "many", 1))
    other = similarity.text_units(
        "Kepler measured the orbit of Mars from the notes of Tycho Brahe and found that it was an ellipse. " * 3
    )
    assert (similarity.minhash_bands(words) == similarity.minhash_bands(changed)).any()
    assert not (similarity.minhash_bands(words) == similarity.minhash_bands(other)).any()


TEXTS = [
    RIVER,
    RIVER.upper() + "!!",
    RIVER + RIVER,
    QUESTION + " Sunset Boulevard",
    "A text of its own about Kepler and Mars.",
]


def selected(tmp_path, **change) -> tuple[list[str], dict]:
    """Texts that are kept of TEXTS + a broken line, and what the selection says."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "broken\n")
    source = sources.DataSource("mine", "jsonl", (path,), "c")
    (tmp_path / "eval.jsonl").write_text(json.dumps(dict(problem=QUESTION, answer="Sunset Boulevard")) + "\n")
    options = scan.ScanOptions(
        exact=True, near=True, evaluation_sets={"trivia": str(tmp_path / "eval.jsonl")}, stop=False
    )
    parts = scan.list_parts([source], tmp_path / "scan", 200)
    for part in parts:
        scan.scan_part(part, options)
        assert scan.is_scanned(part, options)
    policy = selection.SelectionPolicy(
        **(dict(exact_duplicates="drop", near_duplicates="drop", contaminated="drop", shard_bytes=150) | change)
    )
    found = selection.select_rows(parts, "c", policy, tmp_path / "plan")
    return [row["text"] for plan, _ in found.plans for row in selection.read_plan_rows(plan)], found.facts


def test_rows_are_dropped_and_counted_by_reason_over_all_parts(tmp_path):
    kept, facts = selected(tmp_path)
    assert kept == [RIVER, TEXTS[4]]
    assert facts["dropped"] == {"exact_duplicate": 1, "near_duplicate": 1, "contaminated": 1}
    assert facts["contaminated"] == {"trivia": {"rows": 1, "with_answer": 1}}
    assert sum(facts["bad_rows"].values()) == 1 and "rows.jsonl line 6" in facts["bad_listed"][0]


def test_what_is_only_counted_is_kept(tmp_path):
    kept, facts = selected(tmp_path, exact_duplicates="count", near_duplicates="off", contaminated="count")
    assert kept == TEXTS and not any(facts["dropped"].values())
    assert facts["duplicates"] == {"exact": 1, "near": 0} and facts["contaminated"]["trivia"]["rows"] == 1


def test_shards_are_cut_by_size_and_hold_every_row_once(tmp_path):
    kept, _ = selected(tmp_path, exact_duplicates="count", near_duplicates="off", contaminated="count")
    names = sorted(path.name for path in (tmp_path / "plan").iterdir())
    assert len(names) > 1 and names[0].startswith("c-00000-of-")
    assert kept == TEXTS


def test_hashes_of_windows_are_those_of_their_place_alone():
    numbers = np.arange(1, 40, dtype=np.uint64)
    assert similarity._ngram_hashes(numbers, 13)[7] == similarity._ngram_hashes(numbers[7:20], 13)[0]
    assert len(similarity._ngram_hashes(numbers[:5], 13)) == 0
