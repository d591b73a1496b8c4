"""One endpoint over tiny models: what it answers, what it refuses, and what it leaves behind."""

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import lm_eval
import psutil
import pytest
import ray
import torch
from lm_eval.models.openai_completions import LocalCompletionsAPI
from openai import AuthenticationError, NotFoundError, OpenAI
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import crosslora
from crosslora import cluster
from crosslora.config import Base, Cluster
from crosslora.endpoint import Model, Resources, serve_models
from crosslora.errors import UserError
from crosslora.evaluation.choices import ChoicesAtOnce
from crosslora.evaluation.client import GREEDY, ask
from crosslora.evaluation.harness import ask_harness, find_benchmarks, headline
from crosslora.evaluation.likelihood import reference_nats
from crosslora.evaluation.tasks import Item
from crosslora.text.templates import ChatFormat
from crosslora.vllm_settings import environment, lora_options
from tests.browser import PROGRAM, open_page
from tests.served import (
    IDS,
    MODELS,
    Folders,
    assert_gone,
    chat_answer,
    echoed,
    fuzzed,
    has_engine,
    mmlu_is_right,
    peft_logprobs,
    peft_model,
    replicas,
    served_url,
    serving_processes,
    started_command,
)
from tests.tiny import bare_config, load_tokenizer, tiny_llama, tiny_lora, write_benchmarks

KEY = "a key"
MANY = 12
"""Requests in a row that hardly all reach the same one of two replicas."""
RESOURCES = Resources(threads=1)


@dataclass(frozen=True)
class Server:
    driver: subprocess.Popen[str]
    url: str
    client: OpenAI
    said: list[str]
    """Lines that the command has written since it serves."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("models")
    base = tiny_llama(folder / "base")
    settings = GenerationConfig.from_pretrained(base)
    settings.repetition_penalty = 1.3
    settings.save_pretrained(base)
    adapters = {"one": tiny_lora(folder / "one", base, 1), "two": tiny_lora(folder / "two", base, 2, r=12)}
    return Folders(base, adapters)


@pytest.fixture(scope="module")
def places(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose adapters are served."""
    place = tmp_path_factory.mktemp("places")
    for name, folder in folders.adapters.items():
        shutil.copytree(folder, place / name)
    return place


@pytest.fixture(scope="module")
def server(folders: Folders, places: Path) -> Iterator[Server]:
    """The command, with two adapters, two replicas and a Ray of its own."""
    with started_command(folders, places, "--replicas=2", CROSSLORA_API_KEY=KEY) as driver:
        url = served_url(driver)
        said: list[str] = []
        threading.Thread(target=said.extend, args=[driver.stdout], daemon=True).start()
        yield Server(driver, url, OpenAI(base_url=url, api_key=KEY, max_retries=0), said)


def test_a_taken_port_is_refused_before_ray_starts(folders: Folders) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=rf"port {port} on 127.0.0.1: .* in use; .* another port"),
            serve_models([_model(folders.base)], RESOURCES, port=port),
        ):
            pass
    assert not ray.is_initialized()


def test_bad_models_are_refused_before_ray_starts(folders: Folders, tmp_path: Path) -> None:
    cases: list[tuple[Path, list[Path], str]] = [
        (tmp_path / "none", [], "does not exist"),
        (folders.base, [tmp_path / "none"], "not a folder"),
        (folders.base, [tiny_lora(tmp_path / "base", folders.base)], "name of the base"),
        (folders.base, [tiny_lora(tmp_path / "wide", folders.base, r=513)], "rank 513"),
    ]
    for base, adapters, message in cases:
        with (
            pytest.raises(UserError, match=message),
            serve_models([_model(base, *adapters)], RESOURCES),
        ):
            pass
    assert not ray.is_initialized()


def test_lora_options_hold_all_adapters(folders: Folders) -> None:
    assert lora_options([]) == {}
    assert lora_options([folders.adapters["one"]])["max_lora_rank"] == 8
    options = lora_options(folders.adapters.values())
    assert (options["max_loras"], options["max_lora_rank"]) == (2, 16)
    assert options["lora_target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_the_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert environment(3)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment(3)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert environment(3)["VLLM_CPU_KVCACHE_SPACE"] == "7"


@pytest.mark.real
def test_the_base_and_its_adapters_are_listed(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == MODELS


@pytest.mark.real
def test_a_request_without_the_key_is_refused(server: Server) -> None:
    with pytest.raises(AuthenticationError):
        server.client.with_options(api_key="another").models.list()


@pytest.mark.real
def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(server: Server) -> None:
    with urllib.request.urlopen(server.url.removesuffix("v1")) as answer:
        page = answer.read().decode()
    assert "<title>crosslora</title>" in page
    assert not re.findall(r"(?:https?:)?//\w", page)


@pytest.mark.real
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_the_page_shows_answers_side_by_side(server: Server) -> None:
    with open_page(server.url.removesuffix("v1")) as page:
        page.wait_for("document.querySelector('#models .failed')")  # it wants the key
        page.evaluate(
            f"form.key.value = '{KEY}', form.key.dispatchEvent(new Event('change')), form.tokens.value = 5, true"
        )
        page.wait_for("document.querySelectorAll('[name=model]').length == 3")
        page.evaluate("document.querySelector('[value=two]').click()")  # not that one
        page.evaluate("form.prompt.value = 'Play the new album', form.requestSubmit()")
        notes = "[...document.querySelectorAll('#answers small')].map(note => note.textContent)"
        page.wait_for(f"{notes}.length == 2 && {notes}.every(note => note.includes('s, '))")
        answers = page.evaluate(
            "[...document.querySelectorAll('#answers pre')].map(text => text.textContent)"
        )
        assert page.screenshot().startswith(b"\x89PNG")
    asked = [chat_answer(server.client, model, "Play the new album") for model in ("base", "one")]
    assert answers == asked and answers[0] != answers[1]


@pytest.mark.real
def test_a_prompt_of_token_ids_is_completed(server: Server) -> None:
    options = {"ignore_eos": True, "return_tokens_as_token_ids": True, **GREEDY}
    answer = server.client.completions.create(
        model="one", prompt=IDS, max_tokens=5, temperature=0, logprobs=3, extra_body=options
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(IDS), 5)
    logprobs: Any = answer.choices[0].logprobs
    for token, chosen, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert chosen == top[token] == max(top.values()), f"{token} is not the greedy choice"


@pytest.mark.real
def test_chat_uses_the_template_of_the_base(server: Server, folders: Folders) -> None:
    tokenizer = load_tokenizer(folders.base)
    messages: list[Any] = [{"role": "user", "content": "Play the new album"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = server.client.chat.completions.create(
        model="two", messages=messages, max_tokens=4, temperature=0, extra_body={"return_token_ids": True}
    )
    assert answer.model_extra is not None
    assert answer.model_extra["prompt_token_ids"] == prompt


@pytest.mark.real
def test_logprobs_in_a_mixed_batch_are_those_of_peft(server: Server, folders: Folders) -> None:
    """Echo with an adapter also shows that the head is not wrapped for LoRA, which would kill the engine."""
    with ThreadPoolExecutor(24) as pool:
        served = list(pool.map(lambda model: echoed(server.client, model), MODELS * 8))
    expected = [peft_logprobs(folders, folders.adapters.get(model)) for model in MODELS]
    for row, reference in zip(served, expected * 8, strict=True):
        torch.testing.assert_close(row, reference, atol=2e-4, rtol=0)
    base, one, two = served[:3]
    assert min((base - one).abs().max(), (base - two).abs().max(), (one - two).abs().max()) > 0.05


@pytest.mark.real
def test_the_harness_gives_the_likelihoods_of_peft(
    server: Server, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_benchmarks(tmp_path)
    benchmarks = find_benchmarks(["mmlu", "gsm8k"], tmp_path, None)
    samples = ask_harness(server.url, "one", str(folders.base), frozenset(), benchmarks)
    scores = {name: headline(samples, benchmark) for name, benchmark in benchmarks.of_harness.items()}
    assert [(metric, len(values)) for metric, values in scores.values()] == [("acc", 6), ("exact_match", 2)]
    task = benchmarks.of_harness["mmlu"].definition
    expected = [mmlu_is_right(folders, row) for row in task["custom_dataset"]()["test"]]
    assert scores["mmlu"][1].tolist() == expected


@pytest.mark.real
def test_judged_answers_are_greedy_whatever_the_base_prefers(
    server: Server, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base comes with a repetition penalty, which requests get that do not name one."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    chat = ChatFormat(load_tokenizer(folders.base))
    model, ids = peft_model(folders, folders.adapters["one"]), chat.prompt_ids("Say river")
    with torch.inference_mode():
        for _ in range(24):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    prompt = chat.prompt_ids("Say river")
    expected = chat.tokenizer.decode(ids[len(prompt) :])
    (answer,) = ask(server.url, "one", [Item("Say river", "")], chat, 24, 1)
    assert len(answer.text) > 8 and expected.startswith(answer.text)  # half of a character is held back
    penalised = server.client.completions.create(model="one", prompt=prompt, max_tokens=24, temperature=0)
    assert not expected.startswith(penalised.choices[0].text)


@pytest.mark.real
def test_choices_asked_for_at_once_are_as_likely_as_one_by_one(
    server: Server, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the choices is not among the likeliest, another is more than one token."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint: Any = {"model": "one", "base_url": f"{server.url}/completions", "tokenizer": str(folders.base)}
    endpoint["num_concurrent"] = 4
    clients = [ChoicesAtOnce(frozenset({3}), **endpoint), LocalCompletionsAPI(**endpoint)]
    context = load_tokenizer(folders.base)("Which of these is a fruit?\nAnswer:")["input_ids"]
    reply = server.client.completions.create(
        model="one",
        prompt=context,
        max_tokens=1,
        logprobs=20,
        extra_body={"return_tokens_as_token_ids": True},
    )
    (top,) = reply.choices[0].logprobs.top_logprobs  # type: ignore[union-attr, misc]
    likeliest = [int(token.removeprefix("token_id:")) for token in top]
    unlikely = next(i for i in range(100, 200) if i not in likeliest)
    choices = [[likeliest[0]], [likeliest[7]], [unlikely], likeliest[:2]]
    requests = [(("", str(choice)), context, choice) for choice in choices]
    at_once, one_by_one = (client._loglikelihood_tokens(requests) for client in clients)
    assert [greedy for _, greedy in at_once] == [greedy for _, greedy in one_by_one]
    assert [value for value, _ in at_once] == pytest.approx([value for value, _ in one_by_one], abs=1e-3)
    payload = clients[0]._create_payload([context], generate=True, gen_kwargs={"max_gen_toks": 8})
    assert payload["stop_token_ids"] == [3], "a written answer ends where an answer of the template does"


@pytest.mark.real
def test_the_harness_chats_as_the_openai_client_does(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_benchmarks(tmp_path)
    endpoint = {"model": "two", "base_url": f"{server.url}/chat/completions", "max_gen_toks": 6}
    found = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args=endpoint,
        tasks=[find_benchmarks(["gsm8k"], tmp_path, None).of_harness["gsm8k"].definition],
        num_fewshot=0,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found is not None and len(found["samples"]["gsm8k"]) == 2
    for row in found["samples"]["gsm8k"]:
        question = f"Question: {row['doc']['question']}\nAnswer:"
        assert row["resps"][0][0] == chat_answer(server.client, "two", question, 6)


@pytest.mark.real
def test_curl_gets_what_the_openai_client_gets(server: Server) -> None:
    body = {
        "model": "one",
        "messages": [{"role": "user", "content": "Grüße"}],
        "max_tokens": 5,
        "temperature": 0,
    }
    command = ["curl", "--silent", "--show-error", "--fail", f"{server.url}/chat/completions"]
    headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    answer = subprocess.run(
        [*command, *headers, "-d", json.dumps(body)], check=True, capture_output=True
    ).stdout
    assert json.loads(answer)["choices"][0]["message"]["content"] == chat_answer(
        server.client, "one", "Grüße"
    )


@pytest.mark.real
def test_references_are_as_likely_as_peft_says(
    server: Server, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    chat = ChatFormat(load_tokenizer(folders.base))
    items = [Item("Play the new album", '{"year": "1959"}'), Item("x", "Grüße")]
    served = reference_nats(server.url, "one", items, chat, 2)
    model = peft_model(folders, folders.adapters["one"])
    for item, nats in zip(items, served, strict=True):
        prompt, answer = chat.prompt_ids(item.prompt), chat.answer_ids(item.reference)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        assert nats * (len(item.reference.encode()) + 1) == pytest.approx(float(expected), abs=2e-3)


@pytest.mark.real
def test_a_seed_gives_the_same_answers_to_prompts_that_are_read_in_parts(server: Server) -> None:
    """A step has room for one of these prompts and a part of the next."""
    prompts = [[number] * 400 for number in IDS[:3]]

    def texts(prompt: Any) -> list[str]:
        answer = server.client.completions.create(
            model="one", prompt=prompt, max_tokens=8, seed=1, temperature=1
        )
        return [choice.text for choice in answer.choices]

    together = texts(prompts)  # before their prefixes are in the cache
    assert together == [texts(prompt)[0] for prompt in prompts] and len(set(together)) > 1


@pytest.mark.real
def test_no_request_brings_it_down(server: Server) -> None:
    """2,000 random requests, most of them valid, some with values that nobody foresaw."""
    generator = random.Random(0)
    with ThreadPoolExecutor(32) as pool:
        codes = Counter(
            pool.map(lambda body: _status(server, body), [fuzzed(generator) for _ in range(2000)])
        )
    assert set(codes) <= {200, 400, 404} and codes[200] > 500, codes
    assert {model.id for model in server.client.models.list()} == set(MODELS)
    assert len(echoed(server.client, "two")) == len(IDS) - 1


@pytest.mark.real
def test_adapters_come_and_go_on_all_replicas(
    server: Server, folders: Folders, places: Path, tmp_path: Path
) -> None:
    """What is asked for while its adapter goes is answered to its end."""
    three = tiny_lora(tmp_path / "three", folders.base, 3)
    shutil.copytree(three, places / "three")
    _until(lambda: all(_serves(server, "three") for _ in range(MANY)))
    torch.testing.assert_close(
        echoed(server.client, "three"), peft_logprobs(folders, three), atol=2e-4, rtol=0
    )
    stream = server.client.completions.create(
        model="three", prompt=IDS, max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    shutil.rmtree(places / "three")
    _until(lambda: not any(_serves(server, "three") for _ in range(MANY)))
    assert list(stream)[-1].choices[0].finish_reason == "length"


@pytest.mark.real
def test_adapters_that_do_not_fit_or_do_nothing_of_use_are_not_served(
    server: Server, folders: Folders, places: Path, tmp_path: Path
) -> None:
    wide = tiny_lora(tmp_path / "wide", folders.base, 4, r=64)
    shutil.copytree(wide, places / "wide")
    for name, factor in (("idle", 0.0), ("diverged", float("nan"))):
        folder = tiny_lora(tmp_path / name, folders.base, 4)
        weights = folder / "adapter_model.safetensors"
        tensors = {key: B if "lora_A" in key else B * factor for key, B in load_file(weights).items()}
        save_file(tensors, weights)
        shutil.copytree(folder, places / name)
    for reason in (
        "not serving wide: .* does not fit what this server was started for",
        "not serving idle: it changes nothing",
        "not serving diverged: its answers are no numbers",
    ):
        _until(lambda reason=reason: re.search(reason, "".join(server.said)) is not None)  # type: ignore[misc]
    assert [model.id for model in server.client.models.list()] == MODELS
    for name in ("wide", "idle", "diverged"):
        shutil.rmtree(places / name)


@pytest.mark.real
@pytest.mark.parametrize("requests", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_answer_is_of_another_model_while_all_are_replaced(
    server: Server, folders: Folders, places: Path, tmp_path: Path, requests: int
) -> None:
    """Three adapters become others, and themselves again, while 32 clients ask: six versions, and room for four."""
    first = folders.adapters | {"three": tiny_lora(tmp_path / "three", folders.base, 3)}
    second = {
        name: tiny_lora(tmp_path / f"new {name}", folders.base, seed) for seed, name in enumerate(first, 5)
    }
    shutil.copytree(first["three"], places / "three")
    _until(lambda: all(_serves(server, "three") for _ in range(MANY)))
    models = ["base", *first]
    numbers = [number for number in range(4 * MANY) if number % 4]  # of adapters
    versions = {"base": [peft_logprobs(folders, None)]}
    versions |= {name: [peft_logprobs(folders, of[name]) for of in (first, second)] for name in first}

    def ask(number: int) -> int:
        """Which version of its model an answer is of."""
        model = models[number % 4]
        answer = echoed(server.client, model)
        return next((i for i, version in enumerate(versions[model]) if _close(answer, version)), -1)

    started = time.time()
    with ThreadPoolExecutor(32) as pool:
        for version, adapters in ((1, second), (0, first)):
            asked = pool.map(ask, range(requests // 2))
            for name, folder in adapters.items():
                shutil.copytree(folder, places / name, dirs_exist_ok=True)
            assert set(asked) <= {0, 1}, "of another model"
            _until(lambda version=version: set(pool.map(ask, numbers)) == {version})  # type: ignore[misc]
    written = Path(tempfile.gettempdir()).glob("tmp*/three-*")
    of_replicas = {folder.parent for folder in written if folder.stat().st_mtime > started}
    assert [len([*folder.glob("one-*")]) for folder in of_replicas] == [2, 2], "the last two versions"
    shutil.rmtree(places / "three")
    _until(lambda: not any(_serves(server, "three") for _ in range(MANY)))


@pytest.mark.real
@pytest.mark.slow
def test_clients_that_retry_lose_nothing_with_a_replica(
    server: Server, folders: Folders, places: Path
) -> None:
    """Nor with the shelf that the replicas wait at."""
    client = server.client.with_options(max_retries=10)
    expected = {"base": peft_logprobs(folders, None)}
    expected |= {name: peft_logprobs(folders, path) for name, path in folders.adapters.items()}

    assert len(replicas("vllm-0")) == 2
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda number: echoed(client, MODELS[number % 3]), range(1000))
        replicas("vllm-0")[0].kill()
        replicas("shelf-0")[0].kill()
        for number, answer in enumerate(answers):
            assert _close(answer, expected[MODELS[number % 3]])
    deadline = time.monotonic() + 180
    while len(replicas("vllm-0")) < 2 or not replicas("shelf-0"):
        assert time.monotonic() < deadline, "no new replica"
        time.sleep(1)
    _until(lambda: all(_serves(server, model) for model in MODELS for _ in range(MANY)), seconds=60)
    tiny_lora(places / "late", folders.base, 6)
    _until(lambda: all(_serves(server, "late") for _ in range(MANY)))
    shutil.rmtree(places / "late")


@pytest.mark.real
def test_a_second_server_on_the_cluster_is_refused(server: Server, folders: Folders, tmp_path: Path) -> None:
    """Also the one that a transfer would need in hours."""
    with (
        cluster.session(Cluster(address="auto")),
        pytest.raises(UserError, match="Ray Serve already runs"),
        serve_models([_model(folders.base)], RESOURCES),
    ):
        pass
    bases = {"source": {"base": str(folders.base)}, "target": {"base": str(folders.base)}}
    adapters = [{"name": "one", "path": str(folders.adapters["one"])}]
    config = bare_config(
        **bases,
        adapters=adapters,
        run=str(tmp_path / "run"),
        synthesis={"max_response_tokens": 64},  # the base has 512 positions
        cluster={"address": "auto"},
    )
    with pytest.raises(UserError, match="Ray Serve already runs"):
        crosslora.transfer(config)
    assert not (tmp_path / "run/synthesize").exists()
    assert len(list(server.client.models.list())) == 3, "the first server goes on"


@pytest.mark.real
def test_nothing_is_left_after_ctrl_c(server: Server) -> None:
    started = serving_processes()
    assert has_engine(started)
    server.driver.send_signal(signal.SIGINT)
    assert server.driver.wait(180) == 0
    assert_gone(started)


@pytest.mark.real
@pytest.mark.slow
def test_replicas_come_with_the_load(folders: Folders) -> None:
    autoscaling = "{max_replicas: 2, target_ongoing_requests: 1, upscale_delay_s: 1}"
    with started_command(folders, folders.adapters["one"], f"--autoscaling={autoscaling}") as command:
        client = OpenAI(base_url=served_url(command), api_key="none", max_retries=0)
        deadline = time.monotonic() + 300
        with ThreadPoolExecutor(8) as pool:
            while len(replicas("vllm-0")) < 2:
                assert time.monotonic() < deadline, "one replica answers everything"
                list(pool.map(lambda _: echoed(client, "one"), range(64)))


@pytest.mark.real
@pytest.mark.slow
def test_nothing_is_left_when_the_driver_is_killed(folders: Folders) -> None:
    """Killed while vLLM starts, on a cluster that goes on: there the actors of Ray Serve would outlive their driver."""
    with (
        cluster.session(Cluster()),
        started_command(
            folders, folders.adapters["one"], RAY_ADDRESS=ray.get_runtime_context().gcs_address
        ) as driver,
    ):
        while not has_engine(started := serving_processes()):
            assert driver.poll() is None
            time.sleep(0.1)
        driver.kill()
        assert_gone(started)
        assert not serving_processes()


@pytest.mark.real
@pytest.mark.slow
def test_no_engine_is_left_when_ray_breaks(folders: Folders) -> None:
    """Without its head process Ray ends its actors, but not their children."""
    with started_command(folders, folders.adapters["one"]) as driver:
        served_url(driver)
        started = serving_processes()
        assert has_engine(started)
        for process in psutil.Process(driver.pid).children():
            if "gcs_server" in process.name():
                process.kill()
        time.sleep(2)
        driver.kill()
        assert_gone(started)


def _model(base: Path, *adapters: Path) -> Model:
    return Model.of_folders(Base(base=str(base)), "base", adapters, "float32", 256)


def _serves(server: Server, model: str) -> bool:
    """Whether the replica that gets the request serves the model."""
    try:
        server.client.completions.create(model=model, prompt=IDS, max_tokens=1)
    except NotFoundError:
        return False
    return True


def _until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def _status(server: Server, body: dict[str, Any]) -> int:
    route = "chat/completions" if "messages" in body else "completions"
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.url}/{route}", json=body, headers=headers, timeout=120).status_code


def _close(row: torch.Tensor, reference: torch.Tensor) -> bool:
    return torch.allclose(row, reference, atol=2e-4, rtol=0)
