"""What the teacher's engines record is what PEFT computes in float32, and both engines record the same."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from crosslora import cluster
from crosslora.config import Cluster, Synthesis, load_config
from crosslora.models import load_format, resolve
from crosslora.precision import chosen
from crosslora.teacher.engine import Generation, Sampling, TransformersEngine, VllmEngine
from crosslora.vllm_settings import environment
from tests.tiny import load_tokenizer, tiny_llama, tiny_lora

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent.parent
FAITHFUL = 2e-3
"""Nats per token: the most that KL(teacher as served || PEFT teacher in float32) may be."""
DEFAULT_DTYPE = chosen(Synthesis().dtype, on_gpu=False)
Ids = list[list[int]]


class RemoteVllm:
    """VllmEngine where it runs for users: in a Ray actor with vLLM's environment."""

    def __init__(self, base: str, adapter: Path, **options: Any) -> None:
        actor = ray.remote(VllmEngine).options(num_cpus=1, runtime_env={"env_vars": environment(2)})
        self._actor = actor.remote(base, adapter, parallel={}, seed=0, **options)

    def generate(self, prompts: Ids, sampling: Sampling, *, adapter: bool) -> list[Generation]:
        result: list[Generation] = ray.get(self._actor.generate.remote(prompts, sampling, adapter=adapter))
        return result

    def score(self, prompts: Ids, responses: list[np.ndarray]) -> list[np.ndarray]:
        result: list[np.ndarray] = ray.get(self._actor.score.remote(prompts, responses))
        return result


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with cluster.session(Cluster()):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("teacher")
    base = tiny_llama(folder / "base")
    return base, tiny_lora(folder / "adapter", base, seed=1)


@pytest.fixture(scope="module")
def prompts(folders: tuple[Path, Path]) -> Ids:
    texts = ["Play the new album", "What is 42?", "Grüße aus Zürich", "x", "Book a table for two at seven."]
    tokenizer = load_tokenizer(folders[0])
    return [list(tokenizer(text)["input_ids"]) for text in texts]


@pytest.fixture(scope="module")
def vllm(folders: tuple[Path, Path]) -> RemoteVllm:
    return RemoteVllm(str(folders[0]), folders[1], dtype="float32", max_len=128, top_k=384)


def sampling(top_k: int, temperature: float = 1.0, max_tokens: int = 24) -> Sampling:
    return Sampling(temperature, max_tokens, stop_ids=frozenset({2}), top_k=top_k)


def peft_logprobs(base: str | Path, adapter: Path) -> Callable[[list[int], np.ndarray], torch.Tensor]:
    """log p [n, vocabulary] of every response position under the PEFT teacher in float32."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )

    @torch.inference_mode()
    def logprobs(prompt: list[int], response: np.ndarray) -> torch.Tensor:
        ids = torch.tensor([prompt + response.tolist()])
        result: torch.Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return result

    return logprobs


def kl(served: Generation, log_p: torch.Tensor) -> torch.Tensor:
    """KL(served || p) of each position, over the recorded entries and one class for all the others."""
    there = torch.from_numpy(served.top_ids) >= 0
    log_q = torch.from_numpy(served.top_logprobs).double()
    log_p = log_p.double().gather(1, torch.from_numpy(served.top_ids).long().clamp_min(0))
    q, p = log_q.exp() * there, log_p.exp() * there
    inside = torch.where(there, q * (log_q.masked_fill(~there, 0) - log_p), 0.0).sum(1)
    q_tail, p_tail = (1 - q.sum(1)).clamp_min(1e-9), (1 - p.sum(1)).clamp_min(1e-9)
    return inside + q_tail * (q_tail / p_tail).log()


def test_the_served_teacher_is_the_peft_teacher(
    vllm: RemoteVllm, folders: tuple[Path, Path], prompts: Ids
) -> None:
    reference = peft_logprobs(*folders)
    answers = vllm.generate(prompts, sampling(top_k=384), adapter=True)
    divergence = torch.cat(
        [kl(answer, reference(prompt, answer.ids)) for prompt, answer in zip(prompts, answers, strict=True)]
    )
    assert divergence.mean() <= FAITHFUL and divergence.max() <= FAITHFUL
    off = vllm.generate(prompts, sampling(top_k=384), adapter=False)
    assert kl(off[0], reference(prompts[0], off[0].ids)).mean() > 10 * FAITHFUL, "the adapter must act"


def test_both_engines_write_the_same_records(
    vllm: RemoteVllm, folders: tuple[Path, Path], prompts: Ids
) -> None:
    plain = TransformersEngine(str(folders[0]), folders[1], dtype="float32", seed=0)
    greedy = sampling(top_k=16, temperature=0)
    for ours, theirs in zip(
        vllm.generate(prompts, greedy, adapter=True),
        plain.generate(prompts, greedy, adapter=True),
        strict=True,
    ):
        assert ours.ids.tolist() == theirs.ids.tolist() and ours.finished == theirs.finished
        assert np.abs(ours.logprobs - theirs.logprobs).mean() <= 0.02
        assert [vars(g)[name].shape for g in (ours, theirs) for name in ("top_ids", "top_logprobs")] == [
            (len(ours.ids), 17)
        ] * 4
        assert (ours.top_ids[:, 0] == ours.ids).all() and (theirs.top_ids[:, 0] == theirs.ids).all()
        assert [set(row) for row in ours.top_ids] == [set(row) for row in theirs.top_ids]


def test_both_engines_score_the_same_ids_alike(
    vllm: RemoteVllm, folders: tuple[Path, Path], prompts: Ids
) -> None:
    plain = TransformersEngine(str(folders[0]), folders[1], dtype="float32", seed=0)
    responses = [answer.ids for answer in vllm.generate(prompts, sampling(top_k=1), adapter=True)]
    for ours, theirs in zip(vllm.score(prompts, responses), plain.score(prompts, responses), strict=True):
        assert np.abs(ours - theirs).mean() <= 0.02


@pytest.mark.skipif(not (ROOT / "models").is_dir(), reason="run `make models` first")
def test_the_real_teacher_is_faithful_in_the_default_dtype() -> None:
    config = load_config(ROOT / "examples/snips/demo.yaml")
    base, adapter = resolve(config.source), config.adapters[0].path
    chat = load_format(base, config.source)
    rows = (ROOT / "examples/snips/test.jsonl").read_text().splitlines()[:24]
    prompts = [chat.prompt_ids(row.split('"')[3]) for row in rows]
    engine = RemoteVllm(base, adapter, dtype=DEFAULT_DTYPE, max_len=256, top_k=256)
    answers = engine.generate(prompts, Sampling(0.7, 64, chat.stop_ids, top_k=256), adapter=True)
    reference = peft_logprobs(base, adapter)
    divergence = torch.cat(
        [kl(answer, reference(prompt, answer.ids)) for prompt, answer in zip(prompts, answers, strict=True)]
    )
    print(f"KL(served || float32) {divergence.mean():.2e} nats per token over {len(divergence)} tokens")
    assert divergence.mean() <= FAITHFUL
