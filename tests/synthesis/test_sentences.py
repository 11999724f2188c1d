"""Facts about the one grammar of statements."""

import pytest

from stepdr_jax.synthesis.scripted import sentences


@pytest.mark.parametrize(
    "relation, subject, values, lang, text",
    [
        ("capital", "Austria", ("Vienna",), "en", "The capital of Austria is Vienna."),
        ("currency", "Austria", ("euro",), "en", "The currency of Austria is the euro."),
        ("currency", "X", ("A", "B", "C"), "en", "The currencies of X are the A, the B and the C."),
        ("area", "Austria", ("83871",), "en", "The area of Austria is 83871 square kilometres."),
        ("language", "Aruba", ("Dutch", "Papiamento"), "en", "The languages of Aruba are Dutch and Papiamento."),
        ("language", "X", ("A", "B", "C"), "en", "The languages of X are A, B and C."),
        ("calling_code", "Austria", ("43",), "en", "The calling code of Austria is 43."),
        ("capital", "奥地利", ("维也纳",), "zh", "奥地利的首都是维也纳。"),
        ("area", "奥地利", ("83871",), "zh", "奥地利的面积是83871平方公里。"),
    ],
)
def test_what_is_written_is_read_back(relation, subject, values, lang, text):
    assert sentences.state_fact(relation, subject, values, lang) == text
    statement = sentences.parse_statement(text + r" \cite{web_bakotefi}")
    assert (statement.relation, statement.subject, statement.values, statement.lang) == (
        relation,
        subject,
        values,
        lang,
    )


@pytest.mark.parametrize(
    "text", ["Austria is a country.", "# Austria", "", "Vienna", "The best of Austria is its cake."]
)
def test_other_text_states_nothing(text):
    assert sentences.parse_statement(text) is None


def test_names_with_and_stay_whole_as_subjects():
    assert (
        sentences.parse_statement("The capital of Bosnia and Herzegovina is Sarajevo.").subject
        == "Bosnia and Herzegovina"
    )
