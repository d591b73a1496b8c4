"""The teacher's engines: vLLM, and plain transformers for models or GPUs without it. Both fill the same records."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

ABSENT = -1
"""Token id that fills a top-k row where the engine gave fewer alternatives."""


@dataclass
class Generation:
    """One generated continuation; arrays are per generated token, the stop id included."""

    ids: np.ndarray  # int32 [n]
    finished: bool
    top_ids: np.ndarray  # int32 [n, k]; k = 0 where not asked for
    top_logprobs: np.ndarray  # float32 [n, k]
    logprobs: np.ndarray  # float32 [n], of `ids`


@dataclass(frozen=True)
class Sampling:
    temperature: float
    max_tokens: int
    stop_ids: frozenset[int]
    top_k: int
    """Alternatives to record per position; 0 records none."""


class Engine(Protocol):
    """Source base with the adapter apart, so that one engine gives p_on and p_off."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        adapter: bool,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Continue every prompt, with the adapter on or off; `on_finished` hears how many more are done."""

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[np.ndarray], *, adapter: bool = False
    ) -> list[np.ndarray]:
        """log p of every response id, float32 [n] each; without the adapter it is the source base's alone."""


class VllmEngine:
    """vLLM in this process; the adapter stays apart as a LoRA, never rounded into 16-bit weights."""

    def __init__(
        self,
        base: str,
        adapter: Path,
        *,
        dtype: str,
        max_len: int,
        top_k: int,
        parallel: dict[str, Any],
        seed: int,
    ) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        from crosslora import vllm_lora_cpu
        from crosslora.vllm_settings import lora_options

        vllm_lora_cpu.install()
        self._lora = LoRARequest("teacher", 1, str(adapter))
        self._llm = LLM(
            base,
            dtype=dtype,
            max_model_len=max_len,
            max_num_seqs=256,
            max_num_batched_tokens=2048,
            max_logprobs=max(top_k, 1),
            logprobs_mode="raw_logprobs",
            enforce_eager=not torch.cuda.is_available(),
            disable_log_stats=True,
            seed=seed,
            **parallel,
            **lora_options([adapter]),
        )

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        adapter: bool,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop_token_ids=sorted(sampling.stop_ids),
            logprobs=sampling.top_k or None,
            flat_logprobs=sampling.top_k > 0,
            detokenize=False,
        )
        outputs = self._run(prompts, params, self._lora if adapter else None, on_finished)
        return [_generation(output.outputs[0], sampling) for output in outputs]

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[np.ndarray], *, adapter: bool = False
    ) -> list[np.ndarray]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        joined = [prompt + response.tolist() for prompt, response in zip(prompts, responses, strict=True)]
        outputs = self._run(joined, params, self._lora if adapter else None, None)
        return [
            _realised(output.prompt_logprobs, ids)[len(prompt) :]
            for output, ids, prompt in zip(outputs, joined, prompts, strict=True)
        ]

    def _run(
        self,
        prompts: Sequence[list[int]],
        params: Any,
        lora: Any,
        on_finished: Callable[[int], None] | None,
    ) -> Any:
        from vllm import TokensPrompt

        tokens = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        bar = False if on_finished is None else partial(_CountingBar, on_finished)
        return self._llm.generate(tokens, params, lora_request=lora, use_tqdm=bar)


class _CountingBar(tqdm):
    """The bar that vLLM moves; it shows nothing and passes the counts on."""

    def __init__(self, on_finished: Callable[[int], None], *requests: Any, **options: Any) -> None:
        super().__init__(*requests, file=io.StringIO(), **options)
        # with requests to iterate over it is the bar of those that are handed in, not of those that are done
        self._on_finished = None if requests else on_finished

    def update(self, n: float | None = 1) -> bool | None:
        if self._on_finished is not None:
            self._on_finished(int(n or 0))
        return super().update(n)


def _generation(completion: Any, sampling: Sampling) -> Generation:
    ids = np.array(completion.token_ids, dtype=np.int32)
    finished = completion.finish_reason == "stop"
    if not sampling.top_k:
        empty = np.zeros((len(ids), 0))
        return Generation(
            ids, finished, empty.astype(np.int32), empty.astype(np.float32), np.zeros(len(ids), np.float32)
        )
    top_ids, top_logprobs = _rows(completion.logprobs, len(ids), sampling.top_k + 1)
    logprobs = top_logprobs[np.arange(len(ids)), (top_ids == ids[:, None]).argmax(1)]
    return Generation(ids, finished, top_ids, top_logprobs, logprobs)


def _rows(flat: Any, n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """vLLM's flat record as arrays [n, width]; it holds the realised token first and drops it where it repeats."""
    top_ids = np.full((n, width), ABSENT, dtype=np.int32)
    top_logprobs = np.full((n, width), -np.inf, dtype=np.float32)
    starts, ends = np.array(flat.start_indices), np.array(flat.end_indices)
    counts = ends - starts
    row = np.repeat(np.arange(n), counts)
    column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    top_ids[row, column] = np.array(flat.token_ids, dtype=np.int32)
    top_logprobs[row, column] = np.array(flat.logprobs, dtype=np.float32)
    return _without_twins(top_ids, top_logprobs)


def _without_twins(top_ids: np.ndarray, top_logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The realised token stands first; blank its second mention among the top k."""
    twin = top_ids[:, 1:] == top_ids[:, :1]
    top_ids[:, 1:][twin] = ABSENT
    top_logprobs[:, 1:][twin] = -np.inf
    return top_ids, top_logprobs


def _realised(flat: Any, ids: list[int]) -> np.ndarray:
    """log p of each prompt id, NaN at the first (nothing precedes it)."""
    result = np.full(len(ids), np.nan, dtype=np.float32)
    starts, ends = flat.start_indices, flat.end_indices
    for position in range(1, len(ids)):
        span = slice(starts[position], ends[position])
        result[position] = flat.logprobs[span][flat.token_ids[span].index(ids[position])]
    return result


class TransformersEngine:
    """The same records from a plain PEFT model: slower, for models that vLLM does not run."""

    def __init__(self, base: str, adapter: Path, *, dtype: str, seed: int) -> None:
        from peft import PeftModel

        from crosslora.models import load_model

        model: Any = load_model(base, dtype)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = PeftModel.from_pretrained(model, adapter).eval().to(self._device)
        self._generator = torch.Generator(self._device).manual_seed(seed)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        adapter: bool,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        made = []
        for prompt in prompts:
            made.append(self._one(prompt, sampling, adapter))
            if on_finished is not None:
                on_finished(1)
        return made

    def _one(self, prompt: list[int], sampling: Sampling, adapter: bool) -> Generation:
        rows: list[Any] = []
        cache, finished = None, False
        step = torch.tensor([prompt], device=self._device)
        while len(rows) < sampling.max_tokens and not finished:
            output = self._forward(step, cache, adapter)
            cache = output.past_key_values
            logp = output.logits[0, -1].float().log_softmax(-1)
            token = _sample(logp, sampling.temperature, self._generator)
            rows.append((token, logp[token], logp.topk(max(sampling.top_k, 1))))
            finished = token in sampling.stop_ids
            step = torch.tensor([[token]], device=self._device)
        return _from_rows(rows, finished, sampling.top_k)

    def _forward(self, ids: torch.Tensor, cache: Any, adapter: bool) -> Any:
        if adapter:
            return self._model(input_ids=ids, past_key_values=cache, use_cache=True)
        with self._model.disable_adapter():
            return self._model(input_ids=ids, past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[np.ndarray], *, adapter: bool = False
    ) -> list[np.ndarray]:
        return [self._score_one(p, r.tolist(), adapter) for p, r in zip(prompts, responses, strict=True)]

    def _score_one(self, prompt: list[int], response: list[int], adapter: bool) -> np.ndarray:
        ids = torch.tensor([prompt + response], device=self._device)
        logp = self._forward(ids, None, adapter).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        return logp.gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu().numpy()


def _sample(logp: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logp.argmax())
    return int(torch.multinomial((logp / temperature).softmax(-1), 1, generator=generator))


def _from_rows(rows: list[Any], finished: bool, top_k: int) -> Generation:
    ids = np.array([token for token, _, _ in rows], dtype=np.int32)
    logprobs = np.array([float(logprob) for _, logprob, _ in rows], dtype=np.float32)
    if not top_k:
        empty = np.zeros((len(ids), 0))
        return Generation(ids, finished, empty.astype(np.int32), empty.astype(np.float32), logprobs)
    top_ids = np.stack([np.r_[token, top.indices.cpu().numpy()] for token, _, top in rows]).astype(np.int32)
    top_logprobs = np.stack([np.r_[float(logprob), top.values.cpu().numpy()] for _, logprob, top in rows])
    return Generation(ids, finished, *_without_twins(top_ids, top_logprobs.astype(np.float32)), logprobs)
