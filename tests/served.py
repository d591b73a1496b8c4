"""`crosslora serve` with tiny models as a process: to start it, what to ask, what it must answer, what belongs to it."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from openai import OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.tiny import load_tokenizer

IDS = [72, 101, 40, 7, 200, 31, 310, 55, 101, 9]
MODELS = ["base", "one", "two"]
ENGINE = ("VLLM::", "multiprocessing.spawn")
"""vLLM's engine, named and not yet named."""


@dataclass(frozen=True)
class Folders:
    base: Path
    adapters: dict[str, Path]


@contextmanager
def started_command(
    folders: Folders, place: Path, *options: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """`crosslora serve` with tiny adapters, in a process of its own."""
    fixed = [f"--base={folders.base}", "--dtype=float32", "--max-model-len=512", "--threads=1", "--port=0"]
    command = [sys.executable, "-m", "crosslora", "serve", str(place), *fixed, *options]
    with subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def served_url(driver: subprocess.Popen[str]) -> str:
    """Wait until the command says where it serves."""
    assert driver.stdout is not None
    said = []
    for line in driver.stdout:
        said.append(line)
        if found := re.search(r"http://\S+/v1", line):
            return found[0]
    raise AssertionError(f"the command ended before it served: {''.join(said)}")


def peft_logprobs(folders: Folders, adapter: Path | None) -> torch.Tensor:
    """log p of IDS[1:] with transformers and PEFT in float32."""
    with torch.no_grad():
        logprobs = peft_model(folders, adapter)(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def peft_model(folders: Folders, adapter: Path | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folders.base, dtype=torch.float32)
    return base if adapter is None else PeftModel.from_pretrained(base, adapter)


def fuzzed(generator: random.Random) -> dict[str, Any]:
    """A completion or a chat with some of the known fields."""
    text = "".join(
        chr(generator.choice([0, 10, 34, 97, 233, 0x4E2D, 0x1F600])) for _ in range(generator.randrange(20))
    )
    values: dict[str, list[Any]] = {
        "temperature": [0, 0.7, 10, -1, 1e300],
        "top_p": [1, 1e-9, 0, 0.5],
        "top_k": [-1, 0, 1, 5, 10**6],
        "seed": [0, 1, 2**62, -1],
        "n": [1, 2, 16, 17],
        "stop": ["a", "", [], ["b", text], [""]],
        "stop_token_ids": [[], [0], [2**31 - 1]],
        "min_tokens": [0, 1, 5, 10**6],
        "repetition_penalty": [1, 0.1, 10, 0],
        "presence_penalty": [-2, 2, 3],
        "frequency_penalty": [-2, 0.5],
        "ignore_eos": [True, False, 1],
        "return_token_ids": [True],
        "stream": [True, False],
        "user": [text],
    }
    body: dict[str, Any] = {"model": generator.choice([*MODELS, *MODELS, "none", ""])}
    body["max_tokens"] = generator.choice([0, 1, 2, 3, 4])
    if generator.random() < 0.5:
        body["messages"] = [{"role": "user", "content": text}] * generator.choice([0, 1, 1, 2])
        values |= {"logprobs": [True, False], "top_logprobs": [0, 20, 21]}
    else:
        body["prompt"] = generator.choice(
            [text, IDS, [IDS, IDS], [text, "x"], [], [[]], [2**31 - 1], [399] * 600]
        )
        values |= {"logprobs": [0, 5, 20, 21], "echo": [True, False]}
    for name in generator.sample(sorted(values), generator.randrange(4)):
        body[name] = generator.choice(values[name])
    return body


def mmlu_is_right(folders: Folders, row: dict[str, Any]) -> float:
    """Whether adapter `one` prefers the right letter, with transformers and PEFT in float32."""
    tokenizer = load_tokenizer(folders.base)
    choices = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", row["choices"], strict=True))
    subject = f"The following are multiple choice questions (with answers) about {row['subject']}."
    prompt = f"{subject}\n\n{row['question']}\n{choices}Answer:"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders.base, dtype=torch.float32), folders.adapters["one"]
    )
    context = tokenizer(prompt)["input_ids"]
    likelihoods = []
    for letter in "ABCD":
        ids = torch.tensor([tokenizer(f"{prompt} {letter}")["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        own = logprobs.gather(1, ids[0, 1:, None])[len(context) - 1 :]
        likelihoods.append(float(own.sum()))
    return float(likelihoods.index(max(likelihoods)) == row["answer"])


def serving_processes() -> dict[psutil.Process, str]:
    """Ray Serve's actors and vLLM's processes below this one."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[process] = " ".join(process.cmdline())
    marks = (*ENGINE, "ray::Serve", "ray::Proxy")
    return {process: name for process, name in found.items() if any(mark in name for mark in marks)}


def replicas(of: str) -> list[psutil.Process]:
    """Processes of a deployment."""
    return [p for p, name in serving_processes().items() if f"ray::ServeReplica:crosslora:{of}" in name]


def has_engine(processes: dict[psutil.Process, str]) -> bool:
    return any(mark in name for name in processes.values() for mark in ENGINE)


def assert_gone(processes: dict[psutil.Process, str]) -> None:
    deadline = time.monotonic() + 180
    while left := [name for process, name in processes.items() if alive(process)]:
        assert time.monotonic() < deadline, f"still there after 180 s: {left}"
        time.sleep(0.2)


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def echoed(client: OpenAI, model: str) -> torch.Tensor:
    answer = client.completions.create(
        model=model, prompt=IDS, max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    logprobs: Any = answer.choices[0].logprobs
    return torch.tensor(logprobs.token_logprobs[1 : len(IDS)])


def chat_answer(client: OpenAI, model: str, prompt: str, max_tokens: int = 5) -> str:
    messages: list[Any] = [{"role": "user", "content": prompt}]
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0
    )
    return answer.choices[0].message.content or ""
