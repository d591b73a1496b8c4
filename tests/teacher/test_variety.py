"""What is chosen from many texts of few kinds."""

from hypothesis import given
from hypothesis import strategies as st

from crosslora.teacher.variety import varied

KINDS = ("play {} on the radio", "will it rain in {}", "book a table for {}")


def of_kind(kind: str, count: int) -> list[str]:
    return [kind.format(f"{number:05d}") for number in range(count)]


def test_rare_kinds_are_chosen_as_often_as_common_ones() -> None:
    texts = of_kind(KINDS[0], 80) + of_kind(KINDS[1], 15) + of_kind(KINDS[2], 8)
    chosen = [texts[i] for i in varied(texts, 24)]
    for kind in KINDS:
        assert 6 <= sum(text.startswith(kind[:5]) for text in chosen) <= 10


@given(st.lists(st.text(), max_size=20), st.integers(0, 30))
def test_no_text_is_chosen_twice(texts: list[str], count: int) -> None:
    chosen = varied(texts, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(texts))
