"""The distillation loss across tokenizers, computed so that no `positions x vocabulary` matrix is ever kept.

At a strict position: KL(teacher || student) over the mapped top-k classes plus one tail class.
Elsewhere: cross-entropy on the token that the student would write for the teacher's text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

LOGITS_BYTES = 256 << 20
"""Size of one float32 chunk of logits. It becomes the gradient in place; one more chunk in the model's own dtype goes
in and one comes out. A quarter of this halves the speed of the head's matrix products on CPU."""
SMALLEST_TAIL = 1e-6


@dataclass
class Rows:
    """What N scored positions are compared with; see text.alignment.Targets."""

    student_ids: torch.Tensor  # int64 [N]
    top_ids: torch.Tensor  # int64 [N, k], -1 where unmapped
    top_logprobs: torch.Tensor  # float32 [N, k], -inf where unmapped
    strict: torch.Tensor  # bool [N]

    def chunk(self, start: int, end: int) -> Rows:
        part = slice(start, end)
        return Rows(self.student_ids[part], self.top_ids[part], self.top_logprobs[part], self.strict[part])

    def __len__(self) -> int:
        return len(self.student_ids)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Maechler, "Accurately computing log(1 - exp(-|a|))", 2012)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def row_losses(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Loss of each position in nats, [N], from logits [N, vocabulary]."""
    logits = logits.float()
    log_z = torch.logsumexp(logits, dim=-1, keepdim=True)  # [N, 1]
    return _losses(logits.gather(1, _compared_ids(rows)) - log_z, rows)


def losses_and_gradient(logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """`row_losses` [N], and the gradient of their sum on the logits [N, vocabulary], in their dtype.

    The losses see the logits only through the k + 1 log-probabilities log_p[c] = logits[c] - log Z that are compared.
    With d = d loss / d log_p, the gradient is scatter(d) - softmax(logits) sum(d): three passes over the logits where
    autograd would make a dozen.
    """
    ids = _compared_ids(rows)
    work = logits.to(torch.float32, copy=True)
    compared, largest = work.gather(1, ids), work.amax(1, keepdim=True)
    total = work.sub_(largest).exp_().sum(1, keepdim=True)
    with torch.enable_grad():
        log_p = (compared - largest - total.log()).requires_grad_()
        losses = _losses(log_p, rows)
        (d,) = torch.autograd.grad(losses.sum(), log_p)
    work.mul_(-d.sum(1, keepdim=True) / total).scatter_add_(1, ids, d)
    return losses.detach(), work.to(logits.dtype)


def _compared_ids(rows: Rows) -> torch.Tensor:
    """[N, 1 + k]: the token itself, then the teacher's entries; 0 stands where there is none."""
    return torch.cat([rows.student_ids[:, None], rows.top_ids.clamp_min(0)], 1)


def _losses(log_p: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[N] from the log-probabilities of `_compared_ids`."""
    return torch.where(
        rows.strict, _tail_kl(rows.top_logprobs, log_p[:, 1:], rows.top_ids >= 0), -log_p[:, 0]
    )


def _tail_kl(log_q: torch.Tensor, log_p: torch.Tensor, mapped: torch.Tensor) -> torch.Tensor:
    """KL over the mapped classes and the tail [N]; both tails are clamped away from zero."""
    ceiling = math.log1p(-SMALLEST_TAIL)
    log_q = log_q.masked_fill(~mapped, -math.inf)
    kl = torch.where(mapped, log_q.exp() * (log_q.masked_fill(~mapped, 0.0) - log_p), 0.0).sum(1)
    log_q_tail = log1mexp(torch.logsumexp(log_q, 1).clamp(-30.0, ceiling))
    log_p_tail = log1mexp(torch.logsumexp(log_p.masked_fill(~mapped, -1e4), 1).clamp(-30.0, ceiling))
    return kl + log_q_tail.exp() * (log_q_tail - log_p_tail)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of row losses; the gradient on the hidden states is taken chunk by chunk during the forward pass.

    Taking it there needs each chunk's logits once, where checkpointing would compute them twice.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        rows: Rows,
        head: Callable[[torch.Tensor], torch.Tensor],
        chunks: int,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for i in range(chunks):
            start, end = len(hidden) * i // chunks, len(hidden) * (i + 1) // chunks
            part = hidden[start:end].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(part)
            losses, on_logits = losses_and_gradient(logits.detach(), rows.chunk(start, end))
            (gradient[start:end],) = torch.autograd.grad(logits, part, on_logits)
            total += losses.sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * grad, None, None, None


def chunk_rows(vocabulary: int) -> int:
    """Positions per chunk, so that its logits take LOGITS_BYTES."""
    return max(LOGITS_BYTES // (4 * vocabulary), 1)


def num_chunks(positions: int, vocabulary: int) -> int:
    """Chunks that so many positions are computed in, at least one."""
    return max(-(-positions // chunk_rows(vocabulary)), 1)


def summed_loss(
    hidden: torch.Tensor,
    rows: Rows,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    chunks: int | None = None,
) -> torch.Tensor:
    """Sum over N positions of the loss in nats; hidden [N, hidden], `head` gives logits [n, vocabulary].

    `head` is called once for each of the `chunks`, some of which may be empty; None takes as many as are needed.
    """
    chunks = chunks or num_chunks(len(hidden), vocabulary)
    result: torch.Tensor = _ChunkedLoss.apply(hidden, rows, head, chunks)
    return result


@torch.no_grad()
def losses_of(
    hidden: torch.Tensor,
    rows: Rows,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    chunks: int | None = None,
) -> torch.Tensor:
    """Loss of each of N positions in nats, without gradients; arguments as in `summed_loss`."""
    size, chunks = chunk_rows(vocabulary), chunks or num_chunks(len(hidden), vocabulary)
    starts = range(0, chunks * size, size)
    return torch.cat([row_losses(head(hidden[i : i + size]), rows.chunk(i, i + size)) for i in starts])
