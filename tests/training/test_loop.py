"""Steps, looks and batches, without workers; with them: test_fit.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosslora.config import Fit
from crosslora.training.batches import Example
from crosslora.training.checkpoint import Progress
from crosslora.training.loop import Loop, learning_rate
from tests.tiny import bare_config
from tests.training.test_batches import example


def bare_loop(**settings: Any) -> Any:
    loop: Any = Loop.__new__(Loop)
    loop.fit = bare_config(fit=settings).fit
    loop.progress, loop.rank, loop.world = Progress(), 0, 1
    loop.train = [example([1] * n, [*[2, 3, 4][:n], 9]) for n in (1, 2, 3)]
    return loop


def test_the_parameters_of_the_best_look_are_kept_and_patience_ends_the_fit() -> None:
    loop = bare_loop(steps=99, evaluate_every=1, checkpoint_every=50, patience=2)
    losses, saved = iter([3.0, 1.0, 2.0, 2.0]), []
    loop._held_out_losses = lambda: (next(losses), 0.0)
    loop._step = lambda examples: (0.0, 0)
    loop._resume = lambda: None
    loop._tell = lambda event, **fields: None
    loop._parameters = lambda: {"at": torch.tensor(loop.progress.step)}
    loop._checkpoint = lambda: saved.append(loop.progress.step)
    loop.run()
    assert (loop.progress.step, loop.progress.best_step, int(loop.best["at"])) == (3, 1, 1)
    assert saved == [3], "where it stalled"


class Engine:
    """An embedding and a head in place of a student."""

    def __init__(self, parts: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(16, 8, generator=generator).requires_grad_()
        head = torch.randn(16, 8, generator=generator)
        self.module = SimpleNamespace(logits=lambda hidden: hidden @ head.T)
        self.optimizer: Any = SimpleNamespace(param_groups=[{}])
        self.device, self._parts = torch.device("cpu"), parts

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._parts).backward()

    def step(self) -> None:
        pass


def gradient(parts: int, examples: list[Example]) -> tuple[torch.Tensor, float]:
    loop = bare_loop(batch_size=4, micro_batches=parts)
    loop.engine, loop.vocabulary = Engine(parts), 16
    loss, tokens = loop._step(examples)
    assert tokens == sum(example.length for example in examples)
    return loop.engine.table.grad, loss


def test_parts_of_a_batch_add_up_to_it() -> None:
    """Of unequal lengths, so that a mean of means would be another gradient."""
    examples = [example([1] * n, [*[5, 6, 7, 8][:n], 9]) for n in (1, 2, 3, 4)]
    whole, loss = gradient(1, examples)
    halves, same = gradient(2, examples)
    torch.testing.assert_close(halves, whole)
    assert same == pytest.approx(loss) and whole.abs().max() > 0


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    fit = Fit(steps=100, learning_rate=2e-3, warmup=0.1)
    rates = [learning_rate(fit, step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(2e-3) and rates[100] == 0
