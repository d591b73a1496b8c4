"""A worker that loads a base with ZeRO-3 never holds more than its share."""

import pytest

from benchmarks.zero3_loading import SHAPE, measure


@pytest.mark.real
@pytest.mark.slow
def test_private_memory_at_load_is_the_share() -> None:
    """And less than one of the largest tensors; all of the weights would be eight of them."""
    (row,) = measure(SHAPE, (2,))
    assert row["private"] > row["share"] and row["tensors"] < 1
