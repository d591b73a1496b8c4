"""Rehearsal: text that the target base writes by itself, on which the student must go on agreeing with it.

Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal" (1995). Nothing else holds the student where the
corpus says nothing: what it learns from the teacher would spread over all text.
"""

from __future__ import annotations

from itertools import cycle, islice
from math import ceil

import numpy as np
import torch
from transformers import PreTrainedModel

from crosslora.projection.student import logits_of
from crosslora.text.alignment import Targets
from crosslora.text.pair import TokenizerPair
from crosslora.training.batches import Example

TEXTS = 256
"""Most texts that are written; beyond, they come again."""
TOKENS = 64
"""Of each text, after its first."""
BATCH = 64
"""Texts at a time: with ZeRO-3 every step gathers all weights, and a 70B base caches 1.4 GB for so many."""
FREQUENT = 8192
"""Shared tokens, frequent ones of the teacher's tokenizer first, among which the first token is drawn: one start alone
would give some bases one kind of text."""


def rehearsal(
    base: PreTrainedModel, pair: TokenizerPair, train: list[Example], share: float, random_seed: int
) -> list[Example]:
    """Examples of the base's own text, as many as make up `share` of them and `train` together.

    Every rank must call it (ZeRO-3 gathers) and gets the same, as far as it computes the same.
    """
    wanted = ceil(len(train) * share / (1 - share))
    firsts = np.random.default_rng(random_seed).choice(pair.shared[:FREQUENT, 1], min(wanted, TEXTS))
    prompts = [[*pair.student.bos_ids, int(first)] for first in firsts]
    generator = torch.Generator(base.device).manual_seed(random_seed)
    top_k = train[0].targets.top_ids.shape[1]
    training = {module: module.training for module in base.modules()}
    base.eval()  # with gradient checkpointing a layer that trains keeps no cache
    written: list[Example] = []
    for start in range(0, len(prompts), BATCH):
        written += _write(base, prompts[start : start + BATCH], top_k, generator)
    for module, was_training in training.items():
        module.training = was_training
    return list(islice(cycle(written), wanted))


@torch.no_grad()
def _write(
    base: PreTrainedModel, prompts: list[list[int]], top_k: int, generator: torch.Generator
) -> list[Example]:
    """Sample TOKENS tokens after each of B prompts of one length, with the base's distribution at every one."""
    ids, cache, columns = torch.tensor(prompts, device=base.device), None, []
    for _ in range(TOKENS):
        output = base.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # [B, vocabulary]; of all positions, PyTorch would copy the head once per text on CPU
        logprobs = logits_of(base, output.last_hidden_state[:, -1]).float().log_softmax(-1)
        ids = _sample(logprobs, generator)
        top = logprobs.topk(top_k)
        columns.append((ids, top.indices, top.values))
    ids_BT, top_ids_BTk, top_logprobs_BTk = (
        torch.stack(parts, 1).cpu().numpy() for parts in zip(*columns, strict=True)
    )
    strict = np.ones(TOKENS, dtype=bool)
    return [
        Example(
            prompt,
            Targets(ids_T[:, 0].astype(np.int32), top_ids_Tk.astype(np.int32), top_logprobs_Tk, strict),
        )
        for prompt, ids_T, top_ids_Tk, top_logprobs_Tk in zip(
            prompts, ids_BT, top_ids_BTk, top_logprobs_BTk, strict=True
        )
    ]


def _sample(logprobs_BV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each row [B, 1]: where the summed probabilities pass a random number. torch.multinomial draws one for
    every entry, which takes longer than the model itself."""
    sums_BV = logprobs_BV.exp().cumsum_(-1)
    drawn = torch.rand(len(sums_BV), 1, generator=generator, device=sums_BV.device) * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, drawn).clamp_max(sums_BV.shape[1] - 1)
