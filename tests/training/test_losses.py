"""The chunked loss against a dense one, and what it keeps in memory."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crosslora.training import losses
from crosslora.training.losses import Rows, chunk_rows, log1mexp, losses_of, row_losses, summed_loss


def random_rows(n: int, vocabulary: int, k: int = 4) -> Rows:
    generator = torch.Generator().manual_seed(n)
    top = torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(n)])
    logprobs = torch.log_softmax(torch.randn(n, k + 1, generator=generator), 1)[:, :k]
    top[:, -1], logprobs[:, -1] = -1, -math.inf
    return Rows(top[:, 0].clone(), top, logprobs, torch.arange(n) % 3 > 0)


def dense(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    p, total = torch.log_softmax(logits.double(), 1), logits.new_zeros((), dtype=torch.float64)
    for i in range(len(rows)):
        if not rows.strict[i]:
            total = total - p[i, rows.student_ids[i]]
            continue
        ids = rows.top_ids[i][rows.top_ids[i] >= 0]
        q = rows.top_logprobs[i][: len(ids)].double()
        q_tail, p_tail = 1 - q.exp().sum(), 1 - p[i, ids].exp().sum()
        total = total + (q.exp() * (q - p[i, ids])).sum() + q_tail * (q_tail / p_tail).log()
    return total


@pytest.mark.parametrize("chunks", [None, 9, 40])
def test_chunks_give_the_dense_loss_and_gradient(monkeypatch: pytest.MonkeyPatch, chunks: int | None) -> None:
    """Also where there are more chunks than positions: ranks of ZeRO-3 must agree on a number."""
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * 50 * 3)  # three rows a chunk
    hidden, weight = torch.randn(17, 8), torch.randn(50, 8)
    rows = random_rows(17, 50)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().double().requires_grad_()
    calls = []

    def head(h: torch.Tensor) -> torch.Tensor:
        calls.append(len(h))
        return h @ weight.T

    loss = summed_loss(ours, rows, head, 50, chunks)
    assert (len(calls), sum(calls)) == (chunks or 6, 17) and max(calls) <= 3
    wanted = dense(theirs @ weight.double().T, rows)
    (2 * loss).backward()
    (2 * wanted).backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-4)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)
    calls.clear()
    torch.testing.assert_close(losses_of(hidden, rows, head, 50, chunks).sum(), loss.detach())
    assert (len(calls), sum(calls)) == (chunks or 6, 17)


def test_log1mexp_at_both_ends() -> None:
    x = torch.tensor([-1e-6, -0.1, -0.7, -5.0, -20.0])
    torch.testing.assert_close(log1mexp(x).double(), torch.log(-torch.expm1(x.double())), rtol=1e-5, atol=0)


def test_kl_is_zero_when_the_student_is_the_teacher() -> None:
    logits, rows = torch.randn(6, 30), random_rows(6, 30)
    rows.strict[:] = True
    log_p = torch.log_softmax(logits, 1).gather(1, rows.top_ids.clamp_min(0))
    rows.top_logprobs = log_p.masked_fill(rows.top_ids < 0, -math.inf)
    torch.testing.assert_close(row_losses(logits, rows), torch.zeros(6), atol=1e-5, rtol=0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self.size = max(self.size, each.numel())
        return result


def test_no_tensor_of_positions_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_BYTES", 64 << 20)
    vocabulary, sizes = 262_144, []
    weight = torch.randn(vocabulary, 4)
    for n in (64, 256):
        rows = Rows(
            torch.zeros(n).long(), torch.zeros(n, 1).long(), torch.full((n, 1), -1.0), torch.ones(n) > 0
        )
        hidden = torch.randn(n, 4, requires_grad=True)
        with Largest() as largest:
            summed_loss(hidden, rows, lambda h: h @ weight.T, vocabulary).backward()
        sizes.append(largest.size)
    assert sizes[0] == sizes[1] == chunk_rows(vocabulary) * vocabulary
