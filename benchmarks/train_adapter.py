"""Train an ordinary LoRA adapter on prompt/completion rows: a source adapter to transfer, or an oracle.

    python benchmarks/train_adapter.py models/gemma-3-270m rows.jsonl examples/snips/gemma-adapter

All linears of every layer, the loss on the whole conversation (user turn included) in the base's own chat format, AdamW
with a linear warm-up over a twentieth of the steps and a linear decay to zero. On the CPU, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from crosslora.config import Base
from crosslora.models import load_format, load_model, resolve
from crosslora.progress import progress
from crosslora.text.templates import ChatFormat

WARM_UP = 0.05
GRADIENT_NORM = 1.0
WINDOW = 8
"""Batches among which conversations are sorted by length, so that little is spent on padding."""


def conversations(rows: Path, chat: ChatFormat) -> list[list[int]]:
    """Token ids of every row, from the template's first to the end of the assistant's turn."""
    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return [
        [
            *chat.prompt_ids(row["prompt"]),
            *chat.tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
            chat.eos_id,
        ]
        for row in read
    ]


def batches(examples: list[list[int]], size: int, seed: int) -> Iterator[list[list[int]]]:
    generator = random.Random(seed)
    while True:
        window = sorted(generator.sample(examples, size * WINDOW), key=len)
        alike = [window[start : start + size] for start in range(0, len(window), size)]
        generator.shuffle(alike)
        yield from alike


def loss_of(model: torch.nn.Module, batch: list[list[int]]) -> torch.Tensor:
    """Mean cross-entropy over all tokens but the first of each row; padding on the right is never predicted."""
    rows = [torch.tensor(ids) for ids in batch]
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels_BT[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="hub id, model folder or GGUF file")
    parser.add_argument("rows", type=Path, help="JSON lines with prompt and completion")
    parser.add_argument("output", type=Path, help="folder of the new adapter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--random-seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(given.random_seed)
    base = Base(base=given.base)
    folder = resolve(base)
    chat = load_format(folder, base)
    settings = LoraConfig(
        r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_model(folder, "bfloat16"), settings).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=given.learning_rate, weight_decay=0.0)
    warm = max(round(WARM_UP * given.steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (given.steps - step) / max(given.steps - warm, 1))
    )
    source = batches(conversations(given.rows, chat), given.batch_size, given.random_seed)
    with progress("train", given.steps, "steps") as meter:
        for _ in range(given.steps):
            loss = loss_of(model, next(source))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            meter.advance(1)
    print(f"loss of the last batch: {float(loss.detach()):.3f} nats per token")
    local = Path(given.base)
    model.peft_config["default"].base_model_name_or_path = local.name if local.exists() else given.base
    model.save_pretrained(given.output, save_embedding_layers=False)


if __name__ == "__main__":
    main()
