"""What the judge's answers say, and how they are counted."""

import math

import numpy as np
import pytest

from moe_jax.evaluation import judge
from moe_jax.evaluation.judge import Kind
from moe_jax.evaluation.samples import Sample

ANSWERS = [
    # (answer, its kind and score from 0 to 100 and from 1 to 10)
    ("85", 85, Kind.OUT_OF_RANGE),
    ("7", 7, 7),
    (" 7.5\n", 7.5, 7.5),
    ("7/10", Kind.UNPARSABLE, 7),
    ("85 out of 100", 85, Kind.UNPARSABLE),
    ("Score: 85", 85, Kind.OUT_OF_RANGE),
    ("**Rating:** 9, because of its 2 good ideas", 9, 9),
    ("The score is 4.", 4, 4),
    ("\n\n6\nI compared 3 texts.", 6, 6),
    ("6, yes, 6", 6, 6),
    ("７点", 7, 7),  # full-width digit
    ("On a scale of 1 to 10, I would say 7", Kind.UNPARSABLE, 7),
    ("7 or 8", Kind.UNPARSABLE, Kind.UNPARSABLE),
    ("Score: 7-8", Kind.UNPARSABLE, Kind.UNPARSABLE),
    ("It is a very good text.", Kind.UNPARSABLE, Kind.UNPARSABLE),
    ("Better than GPT4", Kind.UNPARSABLE, Kind.UNPARSABLE),
    ("", Kind.UNPARSABLE, Kind.UNPARSABLE),
    ("I’m sorry, but I can’t rate 1 text.", Kind.REFUSAL, Kind.REFUSAL),
    ("As an AI, I have no opinion.", Kind.REFUSAL, Kind.REFUSAL),
    ("I cannot be sure, but my score: 6", 6, 6),
    ("-3", Kind.OUT_OF_RANGE, Kind.OUT_OF_RANGE),
    ("nan", Kind.UNPARSABLE, Kind.UNPARSABLE),
]


@pytest.mark.parametrize(("answer", "of_100", "of_10"), ANSWERS)
def test_an_answer_is_read_as_the_docstring_says(answer, of_100, of_10):
    for (lowest, highest), expected in (((0, 100), of_100), ((1, 10), of_10)):
        found = judge.parse(answer, lowest, highest)
        if isinstance(expected, Kind):
            assert found.kind is expected and math.isnan(found.score)
        else:
            assert found == judge.Answer(Kind.SCORE, expected)


def test_every_answer_is_counted_once():
    samples = [Sample(str(i)) for i in range(len(ANSWERS))]
    of_ten = judge.Judge(lambda questions: [answer for answer, *_ in ANSWERS], ("{text}",))
    shares = {kind: of_ten.share(samples, kind)[:, 0].sum() for kind in Kind}
    assert sum(shares.values()) == len(ANSWERS)
    assert shares[Kind.SCORE] == of_ten.scores(samples)[:, 1].sum() == 10
    assert shares[Kind.REFUSAL] == 2 and shares[Kind.CUT] == 0


def test_the_score_is_the_mean_over_templates_and_their_range_the_disagreement():
    answers = {"A x": "4", "x B": "7", "A y": "no idea", "y B": "3", "A z": None, "z B": ""}
    found = judge.Judge(lambda questions: [answers[q] for q in questions], ("A {text}", "{text} B"))
    samples = [Sample("x"), Sample("y"), Sample("z")]
    assert found.scores(samples).tolist() == [[5.5, 1], [3, 1], [0, 0]]
    np.testing.assert_allclose(found.disagreement(samples), [[3 / 9, 1], [0, 0], [0, 0]])
    assert found.share(samples, Kind.CUT).tolist() == [[0, 2], [0, 2], [1, 2]]


def test_braces_in_a_text_are_text():
    sample = Sample("{prompt} {x}", prompt="{text}")
    assert (
        judge.filled("{source}|{prompt}|{text}|{other}", sample) == "|{text}|{prompt} {x}|{other}"
    )


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"Rate it.", "has no {text}"), (b"\xff{text}", "is not UTF-8")]
)
def test_a_template_that_cannot_be_used_is_refused(content, complaint, tmp_path):
    (tmp_path / "template.txt").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        judge.read_template(str(tmp_path / "template.txt"))


@pytest.mark.parametrize("text", ["", "1", "10,1", "1,1", "a,b", "1,inf", "nan,2", "1,2,3"])
def test_a_scale_that_is_not_two_rising_numbers_is_refused(text):
    assert judge.scale("0,100") == (0, 100)
    with pytest.raises(ValueError, match="two rising numbers"):
        judge.scale(text)
