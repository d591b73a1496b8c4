"""A tiny teacher that answers and a tiny target of another family: enough for the whole pipeline in a minute."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crosslora.config import Config, parse_config
from tests.tiny import tiny_gemma, tiny_llama, tiny_lora

WORDS = ("river", "album", "city", "table", "song", "summer", "band", "weather")


def make_pair(folder: Path) -> Path:
    """Folders source, target, adapter, and prompts.jsonl; the source has learned to answer with the prompt's word."""
    source = tiny_llama(folder / "source")
    tiny_gemma(folder / "target")
    _teach(folder / "source")
    tiny_lora(folder / "adapter", folder / "source", seed=1)
    del source
    lines = [
        f'{{"prompt": "Say {word} {number}", "completion": "{word}"}}'
        for word in WORDS
        for number in range(12)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _teach(folder: Path) -> None:
    """Make the random model write short answers that end: a minute of nothing but noise would be filtered out."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": word}],
            tokenize=False,
        )
        for word in WORDS
    ]
    batch = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def tiny_config(folder: Path, run: Path, **fit: object) -> Config:
    """A transfer between the tiny pair; two fit workers."""
    return parse_config(
        {
            "run": str(run),
            "source": {"base": "source"},
            "adapters": [{"name": "tiny", "path": "adapter"}],
            "target": {"base": "target"},
            "synthesis": {
                "prompts": {"self": 1, "file": 3, "prompts_file": "prompts.jsonl"},
                "samples": 96,
                "shard_size": 48,
                "max_prompt_tokens": 32,
                "max_response_tokens": 32,
                "dtype": "float32",
                "min_adapter_effect": -100,
                "min_kept": 16,
                "held_out": 0.2,
            },
            "fit": {
                "steps": 12,
                "batch_size": 8,
                "workers": 2,
                "zero_stage": 2,
                "dtype": "float32",
                "checkpoint_every": 4,
                "evaluate_every": 6,
                "min_coverage": 0.1,
                **fit,
            },
            "evaluation": {
                "tasks": [{"name": "say", "path": "prompts.jsonl", "items": 8, "max_tokens": 8}],
                "held_out_items": 4,
                "dtype": "float32",
            },
        },
        folder,
    )
