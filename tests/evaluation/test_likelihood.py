"""What the likelihoods are of; from an endpoint: tests/test_endpoint.py."""

from crosslora.evaluation.likelihood import PASSAGE_CHARACTERS, PASSAGES, passages


def test_there_are_as_many_different_passages_as_reports_say() -> None:
    texts = passages()
    assert [len(text) for text in texts] == [PASSAGE_CHARACTERS] * PASSAGES == [len(t) for t in set(texts)]
