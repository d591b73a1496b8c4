"""Rehearsal: the target base's own text, with the distributions that it was drawn from."""

import numpy as np
import pytest
import torch

from crosslora.config import Base
from crosslora.models import load_model
from crosslora.text.alignment import Targets
from crosslora.text.pair import TokenizerPair
from crosslora.training.batches import Example, collate
from crosslora.training.losses import row_losses
from crosslora.training.rehearsal import TOKENS, rehearsal
from tests.tiny import tiny_gemma, tiny_llama

K = 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TokenizerPair:
    folder = tmp_path_factory.mktemp("bases")
    tiny_llama(folder / "source")
    tiny_gemma(folder / "target")
    return TokenizerPair.load(Base(base=str(folder / "source")), Base(base=str(folder / "target")))


@pytest.fixture(scope="module")
def base(pair: TokenizerPair) -> torch.nn.Module:
    return load_model(pair.student.tokenizer.name_or_path, "float32")


def corpus(size: int) -> list[Example]:
    row = np.zeros((1, K))
    targets = Targets(np.zeros(1, np.int32), row.astype(np.int32), row.astype(np.float32), np.ones(1, bool))
    return [Example([1], targets)] * size


def test_texts_are_the_share_that_is_asked_for(base: torch.nn.Module, pair: TokenizerPair) -> None:
    written = rehearsal(base, pair, corpus(80), 0.2, 0)
    assert len(written) == 20
    assert all(text.length == len(text.prompt_ids) + TOKENS - 1 for text in written)
    assert len({tuple(text.targets.student_ids) for text in written}) == 20
    again = rehearsal(base, pair, corpus(80), 0.2, 0)
    assert [text.prompt_ids for text in again] == [text.prompt_ids for text in written]
    assert np.array_equal(again[-1].targets.student_ids, written[-1].targets.student_ids)


def test_many_samples_see_the_same_texts_again(
    base: torch.nn.Module, pair: TokenizerPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosslora.training.rehearsal.TEXTS", 4)
    written = rehearsal(base, pair, corpus(12), 0.5, 0)
    assert len(written) == 12 and written[4] is written[0]


@pytest.mark.parametrize("training", [True, False])
def test_the_base_agrees_with_its_own_text(
    base: torch.nn.Module, pair: TokenizerPair, training: bool
) -> None:
    """Nothing is to be learned from it before the adapter has changed something."""
    first, *others = base.eval().get_submodule("model.layers").children()
    first.train(training)
    batch = collate(rehearsal(base, pair, corpus(10), 0.5, 1))
    assert first.training is training and not any(layer.training for layer in others)
    with torch.no_grad():
        logits = base(input_ids=batch.ids).logits.flatten(0, 1)[batch.positions]
    losses = row_losses(logits, batch.rows)
    assert len(losses) == 10 * TOKENS and losses.abs().max() < 1e-4
    moved = row_losses(logits + torch.randn_like(logits), batch.rows)
    assert moved.mean() > 0.05
