"""Facts about patching on generated edits of the embedded world's pages, and about what must be refused."""

import pytest

from tools_env.check import patch_bench
from tools_env.errors import ToolError
from tools_env.tools import patch


@pytest.fixture(scope="module")
def result():
    return patch_bench.run_patch_bench(patch_bench.read_texts(None), edits=160, seed=3)


def test_patching_saves_most_of_the_tokens_of_rewriting(result):
    assert result["tokens"]["patch"] < 0.3 * result["tokens"]["rewrite"]


def test_patch_beats_search_and_replace_and_unified_diff_on_anchors_with_slips(result):
    right = {method: counts["right"] for method, counts in result["outcomes"]["slips"].items()}
    assert right["patch"] >= 0.9 * 80
    assert right["patch"] > right["unified diff"] and right["patch"] > right["search and replace"]


def test_patch_never_changes_another_place_silently(result):
    assert not any(methods["patch"]["wrong"] for methods in result["outcomes"].values())
    assert result["outcomes"]["exact"]["patch"]["right"] == 80


def test_a_sentence_with_a_slip_is_replaced_within_its_line():
    text = "One is here. The second sentence speaks of rain. The third is about snow."
    done = patch.apply_patch(text, "The second sentense speaks of  rain.", "It rains.")
    assert done.text == "One is here. It rains. The third is about snow."


def test_a_line_that_says_more_than_the_anchor_is_not_swallowed():
    text = "first line of the text\n   stock forms, with powerful engines, large tyres, and light bodies\nlast line"
    with pytest.raises(ToolError):
        patch.apply_patch(text, "with powerful engines, large tyres, and light  bodies", "X")


def test_indentation_stays():
    assert patch.apply_patch("a\n    the value is seven\nb", "the value  is seven", "eight").text == "a\n    eight\nb"


def test_lines_between_which_the_text_has_an_empty_one_are_found():
    text = "intro\n\nfirst paragraph of it\n\nsecond paragraph of it\n\nend"
    done = patch.apply_patch(text, "first paragraph of it\n\nsecond paragreph of it", "one")
    assert (done.text, done.first_line, done.last_line) == ("intro\n\none\n\nend", 3, 5)


def test_the_command_names_a_folder_without_texts(tmp_path, capsys):
    assert patch_bench.main([f"--texts={tmp_path}"]) == 2
    assert "name another folder" in capsys.readouterr().err
