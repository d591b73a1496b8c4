"""Every sample gets the first reason that applies."""

from typing import Any

import numpy as np
import pytest

from crosslora.config import Synthesis
from crosslora.teacher.filters import _hold_out, count_by_verdict, verdicts
from tests.teacher.test_corpus import sample

SETTINGS = Synthesis()
WORDS = ("alpha river", "beta mountain", "gamma window", "delta kitchen", "omega railway", "sigma orchard")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "kept"),
        ({"finished": False}, "unfinished"),
        ({"response": None}, "undecodable"),
        ({"response": " \n"}, "empty"),
        ({"response": "ab " * 200}, "degenerate"),
        ({"prompt": "ab " * 200}, "degenerate"),
        ({"logprobs_off": np.full(3, -0.5, dtype=np.float32)}, "adapter_effect"),
    ],
)
def test_reasons(changes: dict[str, Any], verdict: str) -> None:
    assert verdicts([sample("0", **changes)], SETTINGS)[0]["verdict"] == verdict


def test_near_duplicates_keep_the_first() -> None:
    texts = (
        "Play the new album by the band tonight",
        "play the  new album by the band tonight",
        "Book a table in Paris",
    )
    rows = verdicts([sample(str(i), prompt=text) for i, text in enumerate(texts)], SETTINGS)
    assert [row["verdict"] for row in rows] == ["kept", "near_duplicate", "kept"]


def test_prompts_of_the_user_are_answered_more_than_once() -> None:
    answers = (
        "It is by a river in the north.",
        "Nobody knows; ask again tomorrow.",
        "It is by a river in the north.",
    )
    of_file = [
        sample(str(i), strategy="file", prompt="Where is it?", response=answer)
        for i, answer in enumerate(answers)
    ]
    assert [row["verdict"] for row in verdicts(of_file, SETTINGS)] == ["kept", "kept", "near_duplicate"]


def test_a_shared_instruction_makes_no_duplicates() -> None:
    instruction = "You turn requests of customers into tickets. " + " ".join(WORDS) * 10
    texts = [
        f"{instruction} Request: {w} {i * 7919} {w[::-1]} {i * 104729}" for w in WORDS for i in range(20)
    ]
    texts.append(texts[7].replace("Request", "request"))
    rows = verdicts([sample(f"{i:03d}", prompt=text) for i, text in enumerate(texts)], SETTINGS)
    assert count_by_verdict(rows[:-1]) == {"kept": len(texts) - 1}
    assert rows[-1]["verdict"] == "near_duplicate"


def test_held_out_samples_are_kept_ones_and_chosen_by_the_random_seed() -> None:
    samples = [
        sample(f"{w}{i}", prompt=f"{w} {i * 7919} {w[::-1]} {i * 104729}") for w in WORDS for i in range(20)
    ]
    rows = verdicts(samples, SETTINGS)
    kept = count_by_verdict(rows)["kept"]
    held_out = [row for row in rows if row["held_out"]]
    assert all(row["verdict"] == "kept" for row in held_out)
    assert len(held_out) == max(round(kept * SETTINGS.held_out), 1)
    assert rows == verdicts(samples, SETTINGS)


def test_all_answers_to_a_held_out_prompt_are_held_out() -> None:
    answers = ("It is far away.", "Nobody knows; ask again tomorrow.", "By a river in the north.")
    samples = [
        sample(f"{w}{i}", strategy="file", prompt=f"Where is the {w}?", response=answer)
        for w in WORDS
        for i, answer in enumerate(answers)
    ]
    rows = verdicts(samples, SETTINGS)
    held_out = {s.prompt for s, row in zip(samples, rows, strict=True) if row["held_out"]}
    trained = {s.prompt for s, row in zip(samples, rows, strict=True) if not row["held_out"]}
    assert held_out and trained and not held_out & trained


@pytest.mark.parametrize("sizes", [(2, 5, 70), (1, 99), (2, 70), (40, 40)])
@pytest.mark.parametrize("random_seed", range(4))
def test_no_more_than_half_is_held_out_however_uneven_the_prompts_are_answered(
    sizes: tuple[int, ...], random_seed: int
) -> None:
    groups: list[list[dict[str, Any]]] = [[{"held_out": False} for _ in range(size)] for size in sizes]
    _hold_out(groups, SETTINGS.model_copy(update={"random_seed": random_seed}))
    held = sum(row["held_out"] for group in groups for row in group)
    assert 0 < held <= sum(sizes) / 2
    assert all(len({row["held_out"] for row in group}) == 1 for group in groups)


def test_of_a_single_prompt_some_answers_are_held_out() -> None:
    answers = ("It is far away.", "Nobody knows; ask again tomorrow.")
    rows = verdicts(
        [sample(str(i), strategy="file", prompt="Where is it?", response=a) for i, a in enumerate(answers)],
        SETTINGS,
    )
    assert sorted(row["held_out"] for row in rows) == [False, True]
