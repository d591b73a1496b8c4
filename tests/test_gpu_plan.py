"""The arithmetic of memory and GPUs, on shapes whose figures are known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console

from benchmarks.plans import MODELS
from crosslora.config import Config
from crosslora.errors import UserError
from crosslora.gpu_plan import fit_length, gpu_plan, longest_text
from crosslora.gpus import GPUS
from crosslora.plan_table import memory_table
from crosslora.sizing import Shape, engine_memory, fit_memory, layer_activations
from crosslora.topology import meta_model
from tests.tiny import bare_config

LEARNED = 100_000_000
ENGINE: Any = {"dtype": "bfloat16", "tensor_parallel": 4, "nodes": 1, "length": 512}


@pytest.fixture(scope="module")
def large() -> Shape:
    return Shape.of(MODELS["Llama-3.1-70B"])


@pytest.fixture(scope="module")
def config() -> Config:
    return bare_config(fit={"steps": 300, "batch_size": 16})


def test_the_shape_is_that_of_the_model(large: Shape) -> None:
    assert large.parameters == 70_553_706_496  # as its model card rounds to 70.6 billion
    assert (large.layers, large.hidden, large.key, large.mlp) == (80, 8192, 1024, 28_672)
    assert large.normed == 2 * 8192
    assert large.largest == 128_256 * 8192


def fit(shape: Shape, **changes: Any) -> float:
    settings: dict[str, Any] = {
        "learned": LEARNED,
        "dtype": "bfloat16",
        "zero_stage": 1,
        "workers": 8,
        "sequences": 2,
        "length": 512,
        "checkpointing": False,
        "on_gpu": True,
    }
    return fit_memory(shape, **(settings | changes)).total


def test_weights_are_whole_without_zero_3_and_shared_with_it(large: Shape) -> None:
    whole, shared = fit(large), fit(large, zero_stage=3)
    gathered = 2 * (2 * large.layer_parameters + large.largest)
    assert whole - shared == pytest.approx(2 * large.parameters * 7 / 8 - gathered)


def test_the_bases_own_texts_count_where_a_step_takes_less(large: Shape) -> None:
    small = {"sequences": 1, "length": 16, "checkpointing": True}
    cache = 64 * 65 * 2 * 80 * 1024 * 2  # texts, tokens, keys and values, layers, their width, bytes
    rows = 64 * 3 * 4 * 128_256
    assert fit(large, **small) == fit(replace(large, normed=0), **small)
    without = fit(large, **small) - cache - rows
    assert without == pytest.approx(2 * large.parameters + LEARNED * (12 + 8 / 8))


def test_what_must_cost_more_does(large: Shape) -> None:
    base = fit(large)
    assert fit(large, sequences=4) > base > fit(large, checkpointing=True)
    assert fit(large, dtype="float32") > base > fit(large, learned=0)
    assert fit(large, workers=1) > base > fit(large, length=256)
    assert layer_activations(large, "bfloat16", 256, False) > layer_activations(large, "bfloat16", 256, True)


def test_a_lora_is_counted_as_peft_makes_it() -> None:
    config = MODELS["Llama-3.1-8B"]
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(meta_model(config), lora, low_cpu_mem_usage=True)
    numbers = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    memory = engine_memory(
        Shape.of(config), rank=16, slots=1, dtype="bfloat16", tensor_parallel=1, nodes=1, length=512
    )
    assert memory.lora == 2 * numbers == 2 * 16 * 32 * (7 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14_336)


def test_tensor_parallel_ranks_share_all_but_the_context_and_half_of_the_lora(large: Shape) -> None:
    one, four = (
        engine_memory(large, rank=16, slots=1, dtype="bfloat16", tensor_parallel=n, nodes=1, length=512)
        for n in (1, 4)
    )
    assert one.weights == 2 * large.parameters
    whole = 2 * 16 * 80 * 7 * 8192  # A of q, k, v, gate, up and B of o, down
    shared = one.weights + one.lora - whole + one.kv_cache
    assert one.total - four.total == pytest.approx(0.75 * shared)


def test_a_large_pair_needs_several_gpus_and_says_how(large: Shape, config: Config) -> None:
    plan = gpu_plan(config, large, large, ranks=(16, 16), learned=LEARNED, gpu="H100-80GB", gpus=None)
    assert plan.smallest == 4
    assert plan.synthesize is not None and plan.fit is not None
    assert plan.synthesize.settings["synthesis.tensor_parallel"] == 4
    assert plan.fit.settings["fit.zero_stage"] == 3
    assert "-s fit.gradient_checkpointing=" in plan.advice
    for stage in (plan.synthesize, plan.fit):
        assert stage.gigabytes * 1e9 <= 0.9 * GPUS["H100-80GB"].memory


def test_more_gpus_take_less_time_and_settings_stay_valid(large: Shape, config: Config) -> None:
    hours = []
    for gpus in (8, 16, 64):
        plan = gpu_plan(config, large, large, ranks=(16, 16), learned=LEARNED, gpu="H100-80GB", gpus=gpus)
        assert plan.fit is not None and plan.synthesize is not None
        hours.append(plan.fit.hours / plan.fit.settings["fit.batch_size"] + plan.synthesize.hours)
        settings = plan.fit.settings
        assert settings["fit.batch_size"] % (settings["fit.workers"] * settings["fit.micro_batches"]) == 0
    assert hours[0] > hours[1] > hours[2]


@pytest.mark.parametrize(
    ("gpu", "gpus", "bytes_per_second", "waits"),
    [
        ("L40S-48GB", 8, 32e9, True),  # PCIe
        ("H100-80GB", 8, 450e9, False),  # NVLink
        ("H100-80GB", 16, 50e9, True),  # a network
    ],
)
def test_what_gpus_send_takes_as_long_as_their_links_are_slow(
    large: Shape, gpu: str, gpus: int, bytes_per_second: float, waits: bool
) -> None:
    config = bare_config(synthesis={"max_response_tokens": 896})
    fit = gpu_plan(config, large, large, ranks=(16, 16), learned=LEARNED, gpu=gpu, gpus=gpus).fit
    assert fit is not None and fit.settings["fit.zero_stage"] == 3
    sending = 1e9 * fit.gigabytes_sent / bytes_per_second / 3600
    assert fit.hours == pytest.approx(sending) if waits else fit.hours > 1.1 * sending


def test_evaluation_takes_what_the_larger_base_takes(large: Shape, config: Config) -> None:
    small = Shape.of(MODELS["Llama-3.1-8B"])
    for source, target, larger in ((small, large, "target"), (large, small, "source")):
        plan = gpu_plan(config, source, target, ranks=(16, 16), learned=LEARNED, gpu="H100-80GB", gpus=8)
        assert f"evaluate, {larger}" in plan.memory
        assert plan.synthesize is not None and plan.evaluate is not None
        assert plan.synthesize.settings["synthesis.tensor_parallel"] == 4  # the larger one decides
        served = engine_memory(large, rank=16, slots=5 if larger == "target" else 4, **ENGINE).total
        assert 1e9 * plan.evaluate.gigabytes == pytest.approx(served)
        if larger == "source":  # the same base, with fewer slots
            assert plan.synthesize.gigabytes < plan.evaluate.gigabytes


def test_memory_is_broken_down_and_shown_in_100_columns(
    large: Shape, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = gpu_plan(config, large, large, ranks=(16, 16), learned=LEARNED, gpu="H100-80GB", gpus=8)
    for row in plan.memory.values():
        assert sum(row.values()) == pytest.approx(2 * row["total"], abs=0.01)
    assert plan.fit is not None and plan.synthesize is not None
    assert not plan.fit.settings["fit.gradient_checkpointing"]
    assert plan.memory["fit"]["total"] == pytest.approx(plan.fit.gigabytes, abs=0.001)
    assert plan.memory["synthesize, source"]["total"] == pytest.approx(plan.synthesize.gigabytes, abs=0.001)
    plain, checkpointed = (plan.memory[name] for name in ("fit", "fit, checkpointing"))
    assert {part for part in plain if plain[part] != checkpointed[part]} == {
        "activations",
        "working",
        "total",
    }
    assert plan.gigabytes_loaded == pytest.approx(4 * 70.553706496)
    assert checkpointed["total"] < plain["total"]
    Console(width=100).print(memory_table(plan))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and not any("…" in line for line in lines)


def test_gpus_of_an_engine_share_heads_evenly(large: Shape, config: Config) -> None:
    odd = replace(large, heads=30)
    plan = gpu_plan(config, odd, odd, ranks=(16, 16), learned=LEARNED, gpu="H100-80GB", gpus=8)
    assert plan.synthesize is None  # two GPUs are too few, and four cannot share 30 heads


def test_hours_of_evaluation_grow_with_its_tasks(large: Shape, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": "x" * 400, "completion": "y"})] * 50
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    hours = []
    for items in (0, 25, 50):
        task = {"name": "t", "path": str(tmp_path / "t.jsonl"), "items": items or 1, "max_tokens": 200}
        config = bare_config(
            evaluation={"tasks": [task], "held_out_items": 0, "baselines": ["crop"], "baseline_items": 10}
        )
        plan = gpu_plan(config, large, large, ranks=(16, 16), learned=LEARNED, gpu="H100-80GB", gpus=4)
        assert plan.evaluate is not None
        hours.append(plan.evaluate.hours)
    tokens = 50 + 2 * 50 + 10  # teacher; target base and student; the baseline
    weights, length = 2 * large.parameters, 100 + 200
    cache = 2 * 2 * 80 * 1024 * length
    writing = 200 * (weights / 64 + cache) / (0.5 * 3.35e12)
    reading = 2 * length * weights / (0.4 * 989e12)
    assert hours[2] == pytest.approx(tokens * (writing + reading) / 4 / 3600)
    assert hours[0] < hours[1] < hours[2]


def test_what_does_not_fit_is_said_with_what_would(large: Shape, config: Config) -> None:
    plan = gpu_plan(config, large, large, ranks=(16, 16), learned=LEARNED, gpu="H100-80GB", gpus=1)
    assert plan.fit is None and plan.synthesize is None
    assert "synthesize and fit cannot run on 1 x H100-80GB; 4 would do" in plan.advice
    assert "for the target takes 144.7 GB per GPU" in plan.advice and "or more GPUs per engine" in plan.advice
    huge = replace(large, parameters=2_000_000_000_000)
    assert gpu_plan(config, huge, huge, ranks=(16, 16), learned=1, gpu="L4-24GB", gpus=None).smallest is None
    with pytest.raises(UserError, match="--gpu B200: not known here; one of A10G-24GB, L4-24GB"):
        gpu_plan(config, large, large, ranks=(16, 16), learned=1, gpu="B200", gpus=None)


def test_prompts_of_the_user_may_be_longer_than_those_that_are_written(
    config: Config, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "x" * 2000}))
    prompts = config.synthesis.prompts.model_copy(update={"file": 1, "prompts_file": file})
    given = config.model_copy(update={"synthesis": config.synthesis.model_copy(update={"prompts": prompts})})
    assert (fit_length(config), fit_length(given)) == (128 + 256, 500 + 256)
    assert longest_text(given) - longest_text(config) == 500 - 128


def test_a_teacher_too_large_for_a_node_is_spread_over_two(config: Config) -> None:
    shape = Shape.of(MODELS["Llama-3.1-405B"])
    plan = gpu_plan(config, shape, shape, ranks=(16, 16), learned=LEARNED, gpu="H100-80GB", gpus=64)
    assert plan.synthesize is not None and plan.synthesize.gpus == 64
    assert "-s synthesis.tensor_parallel=8 -s synthesis.pipeline_parallel=2" in plan.advice


def test_the_advice_names_what_would_change_it(large: Shape) -> None:
    """A base of 1.6T fits on no four nodes of 8 x 80 GB, whatever the texts; a 70B one does with shorter texts."""

    def advice(shape: Shape, gpus: int, **sections: Any) -> str:
        config = bare_config(**sections)
        return gpu_plan(
            config, shape, shape, ranks=(16, 16), learned=LEARNED, gpu="H100-80GB", gpus=gpus
        ).advice

    huge = replace(large, parameters=1_600_000_000_000)
    largest = advice(huge, 64)
    assert largest.startswith("synthesize cannot run on 64 x H100-80GB; no number of them will do")
    assert largest.endswith("72.0 are usable: take a kind with more memory") and "max_tokens" not in largest
    long = advice(large, 8, synthesis={"max_response_tokens": 32_768}, fit={"max_tokens": 1024})
    assert long.startswith("synthesize cannot run on 8")
    assert long.endswith("lower synthesis.max_prompt_tokens or synthesis.max_response_tokens")
    long = advice(large, 4, synthesis={"max_response_tokens": 16_384}, fit={"max_tokens": 16_384})
    assert "max_response_tokens; a fit worker takes" in long and long.endswith("lower fit.max_tokens")
    assert advice(large, 2).endswith("or a kind with more memory")
