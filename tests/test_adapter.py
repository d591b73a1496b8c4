"""The reader and writer of PEFT folders, against PEFT itself and under bad conditions."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from crosslora import adapter
from crosslora.adapter import LoraFactors, check_written, read_adapter, write_adapter
from crosslora.adapter_config import read_settings
from crosslora.adapter_header import read_header
from crosslora.errors import UserError
from tests.saved_adapter import (
    CONFIG,
    Q0,
    UP1,
    WEIGHTS,
    a_key,
    b_key,
    random_factors,
    ranks,
    refused,
    retensor,
    saved_adapter,
    tiny_llama,
)

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OVERLAP = {"q_proj": 1, "layers.0.self_attn.q_proj": 2}  # trained with the first, loaded with the second
transformers_logging.set_verbosity_error()
few = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_adapter(tmp_path)


def peft_model(base: Any, **config: Any) -> Any:
    """A PEFT model whose factors are all random; its B is zero otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # patterns that match no module, a start that PEFT thinks is unusual
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def peft_updates(model: Any) -> dict[str, torch.Tensor]:
    layers = [
        (name, layer) for name, layer in model.base_model.model.named_modules() if isinstance(layer, Linear)
    ]
    return {name: layer.get_delta_weight("default") for name, layer in layers}


@st.composite
def lora_configs(draw: st.DrawFn) -> dict[str, Any]:
    keys = st.sampled_from(
        [*MODULES, "layers.0.self_attn.q_proj", r"^model\.layers\.1\..*_proj", "mlp.*", "(k|v)_proj", "proj"]
    )
    return {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.integers(1, 40)),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True)),
        "layers_to_transform": draw(st.sampled_from([None, [0], [1], 1])),
        "rank_pattern": draw(st.dictionaries(keys, st.integers(1, 7), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(keys, st.integers(1, 40), max_size=3)),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
    }


@few
@given(lora_configs())
@example({"r": 1, "target_modules": ["q_proj"], "alpha_pattern": OVERLAP})
@example({"r": 1, "target_modules": ["q_proj"], "rank_pattern": OVERLAP})
def test_reads_what_peft_loads(config: dict[str, Any]) -> None:
    # PEFT sorts the patterns when it saves them: where two match one module, another may win when it loads them.
    # The folder means what PEFT loads from it.
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model(tiny_llama(), **config).save_pretrained(folder)
        try:
            model: Any = PeftModel.from_pretrained(tiny_llama(), folder)
        except RuntimeError:
            assert "rank_pattern" in refused(Path(folder))
            return
        read, header = read_adapter(folder), read_header(folder)
    layers, updates = model.base_model.model, peft_updates(model)
    assert sorted(updates) == list(read.factors) == list(header.modules)
    assert read.digest == header.digest
    for name, factors in read.factors.items():
        shape = header.modules[name]
        assert (shape.rank, shape.d_in, shape.d_out) == (factors.rank, factors.A.shape[1], factors.B.shape[0])
        assert factors.rank == layers.get_submodule(name).r["default"]
        assert shape.scaling == layers.get_submodule(name).scaling["default"]
        torch.testing.assert_close(factors.B @ factors.A, updates[name])


module_ranks = st.dictionaries(
    st.sampled_from([name for name, _ in tiny_llama().named_modules() if name.endswith("_proj")]),
    st.integers(1, 6),
    min_size=1,
)


@few
@given(module_ranks)
def test_peft_loads_what_is_written(ranks: dict[str, int]) -> None:
    factors = random_factors(ranks, tiny_llama())
    ids = torch.arange(20)[None]
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # an unknown field, a missing tensor or an unmatched pattern would warn
        write_adapter(folder, factors, "some/base", "abc")
        model: Any = PeftModel.from_pretrained(tiny_llama(), folder).eval()
        again, written = read_adapter(folder), read_settings(Path(folder))
    assert peft_updates(model).keys() == factors.keys()
    assert (written.base_model_name_or_path, written.revision) == ("some/base", "abc")
    merged = tiny_llama()
    for name, pair in factors.items():
        merged.get_submodule(name).weight.data += pair.B @ pair.A
        assert torch.equal(again.factors[name].A, pair.A) and torch.equal(again.factors[name].B, pair.B)
    with torch.no_grad():
        logits, plain = model(ids).logits, tiny_llama()(ids).logits
        torch.testing.assert_close(logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    assert (logits - plain).abs().max() > 1e-3


def test_conv1d_of_gpt2_needs_no_transpose(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    model = peft_model(GPT2LMHeadModel(config), r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path)
    ((name, factors),) = read_adapter(tmp_path).factors.items()
    torch.testing.assert_close(factors.B @ factors.A, peft_updates(model)[name].T)


def test_half_precision_and_an_adapter_name_in_the_keys_are_read(folder: Path) -> None:
    def rewrite(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key).bfloat16()

    wanted = read_adapter(folder).factors
    retensor(folder, rewrite)
    read = read_adapter(folder).factors
    assert read.keys() == wanted.keys()
    for name, pair in read.items():
        assert pair.A.dtype == torch.float32
        torch.testing.assert_close(pair.A, wanted[name].A.bfloat16().float())


def test_factors_that_share_memory_are_written(tmp_path: Path) -> None:
    both = random_factors({Q0: 2}, tiny_llama())[Q0]
    stacked = torch.randn(4, 32, requires_grad=True)
    factors = {Q0: LoraFactors(stacked[:2], both.B), UP1: LoraFactors(stacked[2:], torch.randn(48, 2))}
    write_adapter(tmp_path, factors, "base")
    assert ranks(tmp_path) == {Q0: 2, UP1: 2}


def test_written_config_is_in_a_fixed_order_and_plain(tmp_path: Path) -> None:
    factors = random_factors({UP1: 2, Q0: 4}, tiny_llama())
    write_adapter(tmp_path, factors, "some/base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == [Q0, UP1]
    assert config["inference_mode"] is True and config["init_lora_weights"] is True
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "some/base")
    assert config["rank_pattern"] == config["alpha_pattern"] == {rf"^{Q0}".replace(".", r"\."): 4}
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / CONFIG).stat().st_mode


def test_one_module_that_acts_is_enough(folder: Path) -> None:
    retensor(folder, lambda tensors: tensors[b_key(Q0)].zero_())
    assert not read_adapter(folder).factors[Q0].B.any()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_factors_of_a_failed_fit_are_not_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(UserError, match="learning rate"):
        write_adapter(
            tmp_path / "out", {Q0: LoraFactors(torch.ones(2, 32), torch.full((32, 2), value))}, "base"
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_adapter(tmp_path / "file", random_factors({Q0: 2}, tiny_llama()), "base")


def test_a_full_disk_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    digest = read_header(folder).digest
    monkeypatch.setattr(adapter, "save_file", half_written)
    with pytest.raises(UserError, match="No space left"):
        write_adapter(folder, random_factors({Q0: 1}, tiny_llama()), "base")
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert read_header(folder).digest == digest


def test_a_crash_between_the_two_files_leaves_no_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(folder, random_factors({Q0: 1}, tiny_llama()), "base")
    assert f"{CONFIG}: no such file" in refused(folder)
    assert [file.name for file in folder.iterdir()] == [WEIGHTS]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors[b_key(Q0)].view(-1)[0].add_(1e-3), "does not read back"),
        (
            lambda tensors: [tensors.pop(key) for key in (a_key(UP1), b_key(UP1))],
            "other modules than were written",
        ),
    ],
)
def test_what_reads_back_differently_is_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    factors = read_adapter(folder).factors
    check_written(folder, factors)
    retensor(folder, change)
    with pytest.raises(UserError, match=words):
        check_written(folder, factors)


def test_factors_must_fit_each_other() -> None:
    with pytest.raises(ValueError, match="d_in"):
        LoraFactors(torch.ones(2, 3), torch.ones(4, 3))
