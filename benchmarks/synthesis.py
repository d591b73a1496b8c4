"""How fast synthesis is beside plain `vllm.LLM.generate`; writes benchmarks/synthesis.json.

    python benchmarks/synthesis.py --samples 256 --rounds 3

A round runs three processes, one after another, so that no engine disturbs the next: crosslora's teacher makes one
shard, then plain vLLM answers the very same prompts with the same k, once with the adapter as vLLM's own LoRA and
once with the adapter merged into the weights. Plain vLLM gets the same engine options and the sampling parameters
that cost it least (flat logprobs, no text), and nobody turns its output into arrays. No answer finds its prompt in
the prefix cache. Medians over the rounds; who goes second and who third changes from one to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import crosslora
from crosslora.config import Config, load_config
from crosslora.evaluation.results import installed
from crosslora.precision import decided
from crosslora.vllm_settings import environment, lora_options

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "examples" / "snips" / "demo.yaml"
CROSSLORA, PLAIN = "crosslora", ("vllm_lora", "vllm_merged")
WARM_UP, CPUS = 16, len(os.sched_getaffinity(0))


def run_crosslora(config: Config, samples: int, prompts_file: Path) -> dict[str, float]:
    """Speed of one shard, whole and of its answers alone; the prompts it answers go to `prompts_file`."""
    from crosslora.teacher import engine, synthesize

    answering = [0.0]  # seconds; every shard asks for its answers once

    class Timed(engine.VllmEngine):
        def generate(
            self, prompts: Any, sampling: engine.Sampling, *, adapter: bool, on_finished: Any = None
        ) -> Any:
            if sampling.top_k:
                self._llm.reset_prefix_cache()
            started = time.perf_counter()
            result = super().generate(prompts, sampling, adapter=adapter, on_finished=on_finished)
            if sampling.top_k:
                answering[0] = time.perf_counter() - started
                prompts_file.write_text(json.dumps(prompts))
            return result

    with patch.object(synthesize, "VllmEngine", Timed):
        teacher = synthesize.Teacher(
            config.source, config.adapters[0].path, config.synthesis, seed=0, board=Mock()
        )
    teacher.shard(0, WARM_UP, None)
    started = time.perf_counter()
    tokens = sum(len(sample.response_ids) for sample in teacher.shard(1, samples, None))
    whole = time.perf_counter() - started
    speed = {"tokens_per_second": tokens / answering[0], "shard_tokens_per_second": tokens / whole}
    return {"tokens": tokens, **speed, "response_seconds": answering[0], "shard_seconds": whole}


def run_plain(config: Config, name: str, prompts_file: Path) -> dict[str, float]:
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    from crosslora.models import load_format, resolve
    from crosslora.teacher.synthesize import max_len

    merge = name == "vllm_merged"
    settings, adapter, base = config.synthesis, config.adapters[0].path, resolve(config.source)
    chat = load_format(base, config.source)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(prompts_file.read_text())]
    options: dict[str, Any] = {"dtype": settings.dtype, "max_num_seqs": 256, "max_num_batched_tokens": 2048}
    options["max_model_len"] = max_len(chat, settings)
    options |= {"max_logprobs": settings.top_k, "logprobs_mode": "raw_logprobs", "seed": 0}
    options |= {"enforce_eager": not torch.cuda.is_available()} | lora_options([] if merge else [adapter])
    model = merged_model(base, adapter, settings.dtype, prompts_file.parent / "merged") if merge else base
    llm = LLM(model, tokenizer=base, **options)
    sampling: dict[str, Any] = {"logprobs": settings.top_k, "flat_logprobs": True, "detokenize": False}
    sampling |= {"temperature": settings.response_temperature, "max_tokens": settings.max_response_tokens}
    params = SamplingParams(stop_token_ids=sorted(chat.stop_ids), **sampling)
    lora = None if merge else LoRARequest("teacher", 1, str(adapter))
    llm.generate(prompts[:WARM_UP], params, lora_request=lora, use_tqdm=False)
    llm.reset_prefix_cache()
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"tokens": tokens, "tokens_per_second": tokens / seconds, "response_seconds": seconds}


def merged_model(base: str, adapter: Path, dtype: str, folder: Path) -> str:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return str(folder)


def measure(name: str, samples: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--samples", str(samples), "--child", name, str(folder)]
    subprocess.run(command, check=True, env={**os.environ, **environment(CPUS)})
    result: dict[str, float] = json.loads((folder / f"{name}.json").read_text())
    print(f"{name:12s} {result['tokens_per_second']:8.1f} response tokens/s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "synthesis.json")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, folder = given.child[0], Path(given.child[1])
        config, prompts = decided(load_config(CONFIG)), folder / "prompts.json"
        ours = name == CROSSLORA
        result = run_crosslora(config, given.samples, prompts) if ours else run_plain(config, name, prompts)
        (folder / f"{name}.json").write_text(json.dumps(result))
        return
    rounds = []
    for number in range(given.rounds):
        plain = PLAIN if number % 2 else PLAIN[::-1]
        with tempfile.TemporaryDirectory() as temporary:
            rounds.append({n: measure(n, given.samples, Path(temporary)) for n in (CROSSLORA, *plain)})
    report(rounds, given.samples, given.out)


def report(rounds: list[dict[str, dict[str, float]]], samples: int, out: Path) -> None:
    def ratio(figure: str, plain: str) -> float:
        return statistics.median(r[CROSSLORA][figure] / r[plain]["tokens_per_second"] for r in rounds)

    ratios = {p: {f: ratio(f, p) for f in ("tokens_per_second", "shard_tokens_per_second")} for p in PLAIN}
    result: dict[str, Any] = {
        "crosslora": crosslora.__version__,
        "versions": installed(),
        "setting": {"cpus": CPUS, "samples": samples, "top_k": load_config(CONFIG).synthesis.top_k},
        "rounds": rounds,
        "ratios": ratios,
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'crosslora beside':18s} {'responses':>10s} {'whole shard':>12s}")
    for plain, row in ratios.items():
        print(f"{plain:18s} {row['tokens_per_second']:10.3f} {row['shard_tokens_per_second']:12.3f}")


if __name__ == "__main__":
    main()
