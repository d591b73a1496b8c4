"""What a model answers, in a process of its own, so that its memory comes back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.quality.tasks import Row
from benchmarks.train_adapter import DTYPE, conversations
from crosslora.config import Base
from crosslora.evaluation.tasks import Answer
from crosslora.projection.student import logits_of


def greedy(base: Base, adapter: Path | None, rows: Sequence[Row], max_tokens: int) -> list[Answer]:
    """Greedy answers of base + adapter, or of the base alone, by vLLM."""
    from crosslora.vllm_settings import environment, lora_options

    os.environ |= environment(len(os.sched_getaffinity(0)))
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    from crosslora import vllm_lora_cpu
    from crosslora.models import load_format, resolve

    vllm_lora_cpu.install()
    folder = resolve(base)
    chat = load_format(folder, base)
    prompts = [TokensPrompt(prompt_token_ids=chat.prompt_ids(row["prompt"])) for row in rows]
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts)
    llm = LLM(
        folder,
        dtype=DTYPE,
        max_model_len=longest + max_tokens + 8,
        max_num_seqs=256,
        enforce_eager=True,
        disable_log_stats=True,
        **lora_options([adapter] if adapter else []),
    )
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=sorted(chat.stop_ids))
    lora = LoRARequest("judged", 1, str(adapter.resolve())) if adapter else None
    outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    chosen = [output.outputs[0] for output in outputs]
    return [Answer(choice.text, choice.finish_reason == "stop") for choice in chosen]


def plain_prompts(base: Base, count: int, random_seed: int) -> list[str]:
    """First lines that the base alone writes in the user's place of its chat format."""
    from crosslora.vllm_settings import environment

    os.environ |= environment(len(os.sched_getaffinity(0)))
    from vllm import LLM, SamplingParams, TokensPrompt

    from crosslora.models import load_format, resolve

    folder = resolve(base)
    chat = load_format(folder, base)
    llm = LLM(folder, dtype=DTYPE, max_model_len=512, enforce_eager=True, disable_log_stats=True)
    params = SamplingParams(
        temperature=0.8,
        max_tokens=96,
        stop=["\n"],
        stop_token_ids=sorted(chat.user_stop_ids),
        seed=random_seed,
        n=count,
    )
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=chat.pre_query_ids)], params, use_tqdm=False)
    written = (choice.text.strip() for choice in output.outputs if choice.finish_reason == "stop")
    return list(dict.fromkeys(text for text in written if text))


@torch.inference_mode()
def nats(base: Base, adapter: Path | None, rows: Sequence[Row]) -> list[float]:
    """Mean nats per byte of each reference answer, its end included, teacher-forced in the model's own chat format.

    Bytes, not tokens: models with other tokenizers are compared.
    """
    from peft import PeftModel

    from crosslora.models import load_format, load_model, resolve

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = resolve(base)
    model: Any = load_model(folder, DTYPE)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    base_model = model.get_base_model() if adapter else model
    spent = []
    for row, conversation in zip(rows, conversations(rows, load_format(folder, base)), strict=True):
        ids = torch.tensor(conversation.ids)
        hidden = base_model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        # in two dimensions; in three, PyTorch would copy the head on CPU
        logits = logits_of(base_model, hidden[conversation.prompt - 1 : -1]).float()
        total = float(cross_entropy(logits, ids[conversation.prompt :], reduction="sum"))
        spent.append(total / (len(row["completion"].encode()) + 1))
    return spent
