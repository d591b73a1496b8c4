"""Train an ordinary LoRA adapter on prompt/completion rows: a source adapter to transfer, or an oracle.

    python -m benchmarks.train_adapter models/gemma-3-270m rows.jsonl examples/snips/gemma-adapter

All linears of every layer, the loss on the whole conversation (user turn included) in the base's own chat format, or on
the completions only; AdamW with a linear warm-up over a twentieth of the steps and a linear decay to zero. On the CPU,
in what it computes fast in.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from crosslora.config import Base
from crosslora.models import load_format, load_model, resolve
from crosslora.precision import chosen
from crosslora.progress import progress
from crosslora.projection.student import logits_of
from crosslora.text.templates import ChatFormat
from crosslora.training.loop import GRADIENT_NORM, use_plain_attention

WARM_UP = 0.05
WINDOW = 8
"""Batches among which conversations are sorted by length, so that little is spent on padding."""
IGNORED = -100
DTYPE = chosen("auto", on_gpu=False)


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained."""

    rank: int = 8
    steps: int = 360
    batch_size: int = 4
    learning_rate: float = 1e-3
    completions_only: bool = False
    random_seed: int = 0


@dataclass(frozen=True)
class Conversation:
    """Token ids from the template's first to the end of the assistant's turn."""

    ids: list[int]
    prompt: int
    """How many of them are the prompt's."""

    @property
    def length(self) -> int:
        return len(self.ids)


def read_rows(path: Path) -> list[dict[str, str]]:
    return rows_of(path.read_text(encoding="utf-8"))


def rows_of(text: str) -> list[dict[str, str]]:
    """Of JSON lines."""
    # not splitlines: JSON may hold U+2028
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def conversations(rows: Sequence[dict[str, str]], chat: ChatFormat) -> list[Conversation]:
    return [_conversation(row, chat) for row in rows]


def _conversation(row: dict[str, str], chat: ChatFormat) -> Conversation:
    prompt = chat.prompt_ids(row["prompt"])
    return Conversation([*prompt, *chat.answer_ids(row["completion"])], len(prompt))


def batches(examples: list[Conversation], size: int, seed: int) -> Iterator[list[Conversation]]:
    generator = random.Random(seed)
    while True:
        window = sorted(
            generator.sample(examples, min(size * WINDOW, len(examples))),
            key=lambda conversation: conversation.length,
        )
        alike = [window[start : start + size] for start in range(0, len(window), size)]
        generator.shuffle(alike)
        yield from alike


def loss_of(model: torch.nn.Module, batch: Sequence[Conversation], completions_only: bool) -> torch.Tensor:
    """Mean cross-entropy in nats per token that counts; padding on the right is never predicted.

    The head sees the positions that count alone.
    """
    ids_BT = _padded([conversation.ids for conversation in batch], 0)
    labels_BT = _padded([_labels(conversation, completions_only) for conversation in batch], IGNORED)[:, 1:]
    base = model.get_base_model()  # type: ignore[operator]
    hidden = base.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
    counts = labels_BT != IGNORED
    return cross_entropy(logits_of(base, hidden[counts]).float(), labels_BT[counts])


def _labels(conversation: Conversation, completions_only: bool) -> list[int]:
    if not completions_only:
        return conversation.ids
    return [IGNORED] * conversation.prompt + conversation.ids[conversation.prompt :]


def _padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, examples: Sequence[Conversation]) -> float:
    """Nats per token of the completions, mean over the rows."""
    losses = [loss_of(model, [example], completions_only=True) for example in examples]
    return float(torch.stack(losses).mean())


def train(base: Base, rows: Sequence[dict[str, str]], recipe: Recipe, title: str = "train") -> PeftModel:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(recipe.random_seed)
    folder = resolve(base)
    examples = conversations(rows, load_format(folder, base))
    use_plain_attention(example.length for example in examples)
    settings = LoraConfig(
        r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_model(folder, DTYPE), settings).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    warm = max(round(WARM_UP * recipe.steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, (recipe.steps - step) / max(recipe.steps - warm, 1)),
    )
    source = batches(examples, recipe.batch_size, recipe.random_seed)
    with progress(title, recipe.steps, "steps") as meter:
        for _ in range(recipe.steps):
            loss = loss_of(model, next(source), recipe.completions_only)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            meter.advance(1, f"loss {float(loss.detach()):.3f}")
    return model


def save(model: PeftModel, base: str, folder: Path) -> None:
    local = Path(base)
    model.peft_config["default"].base_model_name_or_path = local.name if local.exists() else base
    model.save_pretrained(folder, save_embedding_layers=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="hub id, model folder or GGUF file")
    parser.add_argument("rows", type=Path, help="JSON lines with prompt and completion")
    parser.add_argument("output", type=Path, help="folder of the new adapter")
    parser.add_argument("--rank", type=int, default=Recipe.rank)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--completions-only", action="store_true", help="no loss on the user's turn")
    parser.add_argument("--random-seed", type=int, default=Recipe.random_seed)
    given = vars(parser.parse_args())
    base, rows, output = given.pop("base"), given.pop("rows"), given.pop("output")
    save(train(Base(base=base), read_rows(rows), Recipe(**given)), base, output)


if __name__ == "__main__":
    main()
