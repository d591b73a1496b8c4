import json
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslora.errors import UserError
from crosslora.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    f1,
    json_field,
    json_slots,
    paired_difference,
    recovered_gain,
    regex,
    rouge_l,
)

REF = '{"intent": "PlayMusic", "service": "itunes", "artist": "Ben Burnley"}'
flat_objects = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=5)


def test_exact_match_ignores_only_the_white_space_at_the_ends() -> None:
    assert exact_match(" a b\n", "a b") == 1.0
    assert exact_match("a  b", "a b") == exact_match("A b", "a b") == 0.0


@pytest.mark.parametrize(
    ("pred", "score"),
    [
        (REF, 1.0),
        (f"\n{REF}  ", 1.0),
        ('{"artist": "ben BURNLEY", "service": "itunes", "intent": "playmusic"}', 1.0),
        ('{"intent": "PlayMusic"}', 2 * 1 / (1 + 3)),
        ('{"intent": "PlayMusic", "service": "itunes", "artist": "Ben"}', 2 * 2 / 6),
        ('{"intent": "PlayMusic", "service": "itunes", "artist": "Ben Burnley", "year": "1"}', 2 * 3 / 7),
        ('{"Intent": "PlayMusic"}', 0.0),
        ("{}", 0.0),
        ("", 0.0),
        (REF + ".", 0.0),
        (REF[:-1], 0.0),
        (f"Here it is: {REF}", 0.0),
        (f"[{REF}]", 0.0),
        ('"PlayMusic"', 0.0),
        ('{"a":' * 50_000, 0.0),
        ('{"a":' + "9" * 5000 + "}", 0.0),
    ],
)
def test_json_slots(pred: str, score: float) -> None:
    assert json_slots(pred, REF) == pytest.approx(score)


@given(flat_objects, flat_objects)
def test_json_slots_is_the_f1_of_precision_and_recall(pred: dict[str, str], ref: dict[str, str]) -> None:
    predicted, wanted = ({(key, value.lower()) for key, value in obj.items()} for obj in (pred, ref))
    score = json_slots(json.dumps(pred), json.dumps(ref))
    assert score == json_slots(json.dumps(ref), json.dumps(pred))
    if predicted and wanted:
        precision, recall = len(predicted & wanted) / len(predicted), len(predicted & wanted) / len(wanted)
        assert score * (precision + recall) == pytest.approx(2 * precision * recall)
    else:
        assert score == float(predicted == wanted)


def test_nested_values_are_flattened() -> None:
    nested = '{"a": {"b": [1, "X"], "c": true}, "d": null, "e": [], "f": 1.5}'
    assert json_slots(nested, '{"a.b": ["x", "1"], "a.c": "TRUE", "d": "null", "f": "1.5"}') == 1.0
    assert json_slots('{"a": ["x", "y"]}', '{"a": "x"}') == pytest.approx(2 / 3)


def test_json_field() -> None:
    assert json_field('{"intent": "playmusic"}', REF, "intent") == 1.0
    assert json_field('{"intent": "GetWeather", "service": "itunes"}', REF, "intent") == 0.0
    assert json_field('{"service": "itunes"}', REF, "intent") == 0.0
    assert json_field('{"intent": "PlayMusic"', REF, "intent") == 0.0
    assert json_field(REF, REF, "year") == 1.0
    assert json_field('{"year": "1"}', REF, "year") == 0.0


@pytest.mark.parametrize("ref", ["PlayMusic", "[1]", ""])
def test_a_reference_that_is_no_json_object_is_refused(ref: str) -> None:
    for score in (lambda: json_slots("{}", ref), lambda: json_field("{}", ref, "intent")):
        with pytest.raises(UserError, match="not a JSON object; use"):
            score()


def test_f1_counts_words_in_any_order_as_often_as_both_have_them() -> None:
    assert f1("killed police, the gunman", "police killed the gunman") == 1.0
    assert f1("the the the", "the end") == pytest.approx(2 * 1 / 5)
    assert f1("", "a") == f1("a", "") == f1("b", "a") == 0.0


def test_regex_compares_the_last_match() -> None:
    assert regex("so 3 and 4: #### 12", "#### 12", r"#### (\d+)") == 1.0
    assert regex("#### 12 #### 13", "#### 12", r"#### (\d+)") == 0.0
    assert regex("it is B", "B", "[A-D]") == 1.0
    assert regex("none", "B", "[A-D]") == 0.0
    with pytest.raises(UserError, match="has no match"):
        regex("B", "none", "[A-D]")


def test_rouge_l_of_a_known_pair() -> None:
    # Lin 2004, section 3: "police the gunman" shares "police ... gunman"; LCS 2 of 3 and of 4 words.
    assert rouge_l("the gunman police killed", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("police the gunman", "Police, killed the gunman!") == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert rouge_l("", "a") == rouge_l("a", "") == 0.0


def test_rouge_l_reads_other_alphabets() -> None:
    assert rouge_l("über die Brücke", "Über die Brücke") == 1.0
    assert rouge_l("мир", "война") == 0.0


words = st.lists(st.sampled_from(["a", "b", "C", "d1", ",", "_x", "a-b"]), max_size=30).map(" ".join)


@given(words | st.text(st.characters(max_codepoint=127)), words)
def test_rouge_l_equals_the_package_on_ascii(pred: str, ref: str) -> None:
    package = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert rouge_l(pred, ref) == pytest.approx(package.score(ref, pred)["rougeL"].fmeasure)


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(3.0, 1.0, size=(120, 50))
    inside = [low <= 3.0 <= high for low, high in map(bootstrap_interval, samples)]
    assert 0.88 <= np.mean(inside) <= 0.99


def test_interval_is_the_same_each_time_and_narrows_with_more_items() -> None:
    values = np.random.default_rng(0).random(40)
    low, high = bootstrap_interval(values)
    inner_low, inner_high = bootstrap_interval(np.tile(values, 4))
    assert bootstrap_interval(values) == (low, high)
    assert low < inner_low < values.mean() < inner_high < high
    assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)


def test_pairing_narrows_the_difference() -> None:
    rng = np.random.default_rng(0)
    b = rng.random(200)
    a = b + 0.1 + rng.normal(0, 0.01, 200)
    mean, low, high = paired_difference(a, b)
    assert mean == pytest.approx((a - b).mean())
    assert 0.095 < low < mean < high < 0.105


def test_recovered_gain() -> None:
    rng = np.random.default_rng(0)
    base, reference = np.zeros(400), (rng.random(400) < 0.8).astype(float)
    student = reference * (rng.random(400) < 0.5)
    rho = recovered_gain(student, base, reference)
    assert rho.value == pytest.approx(student.mean() / reference.mean())
    assert rho.low is not None and rho.high is not None and rho.value is not None
    assert rho.low < rho.value < rho.high and rho.reason is None
    # The numerator and the denominator move together: a student equal to its reference has no spread at all.
    same = recovered_gain(reference, base, reference)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("gain", [0.0, 0.01, -0.5])
def test_nothing_to_recover(gain: float) -> None:
    rng = np.random.default_rng(0)
    base = rng.random(100)
    rho = recovered_gain(base + 0.3, base, rng.normal(base + gain, 0.1 if gain else 0.0))
    assert (rho.value, rho.low, rho.high) == (None, None, None)
    assert rho.reason is not None and rho.reason.startswith("nothing to recover")


def test_a_gain_just_outside_zero_has_finite_limits() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(0.22, 1.0, size=100)
    rho = recovered_gain(rng.normal(0.2, 1.0, size=100), np.zeros(100), reference)
    assert all(limit is not None and np.isfinite(limit) for limit in (rho.value, rho.low, rho.high))


def test_scores_of_other_items_are_refused() -> None:
    three, four, none = np.ones(3), np.ones(4), np.ones(0)
    for call in (
        lambda: paired_difference(three, four),
        lambda: recovered_gain(three, three, four),
        lambda: bootstrap_interval(none),
        lambda: bootstrap_interval(np.ones((2, 2))),
    ):
        with pytest.raises(ValueError, match="scores are"):
            call()
