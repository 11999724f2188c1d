"""Facts about when a text states a value."""

import pytest

from stepdr_jax.text import citations, matching


@pytest.mark.parametrize(
    "text, value, expected",
    [
        ("The capital of Austria is Vienna.", "Vienna", True),
        ("The capital of Austria is VIENNA.", "vienna", True),
        ("Ｖｉｅｎｎａ", "Vienna", True),  # full width
        ("The capital of Nigeria is Abuja.", "Niger", False),
        ("The population is 8,527,230.", "8527230", True),
        ("The population is 8527230.", "8,527,230", True),
        ("The population is 85272300.", "8527230", False),
        ("The share is 0.3 percent.", "3", False),
        ("The share is 3.5 percent.", "3", False),
        ("The calling code is 3.", "3", True),
        ("Neighbours: 1, 2 and 3", "2", True),
        ("奥地利的首都是维也纳。", "维也纳", True),
        ("奥地利的人口是8527230。", "8527230", True),
        ("奥地利的人口是8527230。", "852723", False),
        ("该说法是Vienna吗", "Vienna", True),
        ("奥地利的首都是萨尔茨堡。", "维也纳", False),
        ("Côte d’Ivoire", "Côte d'Ivoire", True),
        ("anything", "", False),
    ],
)
def test_a_value_is_stated_as_a_whole(text, value, expected):
    assert matching.states_value(text, value) is expected


def test_a_name_inside_a_longer_known_name_is_not_stated():
    names = ["Equatorial Guinea", "Guinea", "印度尼西亚"]
    assert not matching.states_value("The capital of Equatorial Guinea is Malabo.", "Guinea", longer_names=names)
    assert matching.states_value("Guinea borders Mali, not Equatorial Guinea.", "Guinea", longer_names=names)
    assert not matching.states_value("印度尼西亚的首都是雅加达。", "印度", longer_names=names)


def test_citations_are_read_in_order_with_several_ids_in_one_mark():
    text = r"A. \cite{web_bakotefi} B. \cite{web_dufalomi, web_bakotefi} C. \cite{}"
    assert citations.cited_ids(text) == ["web_bakotefi", "web_dufalomi", "web_bakotefi", ""]
    assert citations.strip_citations(text) == "A. B. C."
