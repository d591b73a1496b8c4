"""The reader and writer of PEFT folders, against PEFT itself; and one test for each thing that is refused."""

import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from crosslora import adapter, adapter_config
from crosslora.adapter import LoraFactors, check_written, read_adapter, write_adapter
from crosslora.adapter_config import read_settings
from crosslora.adapter_header import factor_keys, read_header
from crosslora.errors import UserError

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OVERLAP = {"q_proj": 1, "layers.0.self_attn.q_proj": 2}  # trained with the first, loaded with the second
Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
transformers_logging.set_verbosity_error()
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def tiny_llama() -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2)).eval()


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


def random_factors(ranks: dict[str, int], base: Any) -> dict[str, LoraFactors]:
    shapes = {name: base.get_submodule(name).weight.shape for name in ranks}
    return {
        name: LoraFactors(A=torch.randn(rank, shapes[name][1]), B=torch.randn(shapes[name][0], rank) * 0.1)
        for name, rank in ranks.items()
    }


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


def ranks(folder: Path) -> dict[str, int]:
    return {module: pair.rank for module, pair in read_adapter(folder).factors.items()}


def test_header_names_its_folder_and_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder, base_model_name_or_path="org/base")
    monkeypatch.chdir(folder)
    header = read_header(".")
    assert (header.name, header.path) == (folder.name, folder)
    assert header.base_model_name_or_path == "org/base"
    edit(folder, base_model_name_or_path=None)
    assert read_header(folder).base_model_name_or_path == ""


def test_digest_follows_config_and_tensors(folder: Path) -> None:
    digests = [read_header(folder).digest]
    edit(folder, lora_alpha=3)
    digests.append(read_header(folder).digest)
    retensor(folder, lambda tensors: tensors[a_key(Q0)].mul_(2))
    digests.append(read_header(folder).digest)
    assert len(set(digests)) == 3
    assert digests[2] == read_header(folder).digest


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


def test_every_field_of_pefts_config_is_in_one_table() -> None:
    tables = [*adapter_config.USED_FIELDS, *adapter_config.NO_EFFECT_FIELDS, *adapter_config.REFUSED_FIELDS]
    assert sorted(tables) == sorted(field.name for field in dataclasses.fields(LoraConfig))


# What is refused, and what is only warned of


@pytest.fixture(scope="module")
def saved() -> Iterator[dict[str, bytes]]:
    with TemporaryDirectory() as folder:
        factors = random_factors({Q0: 2, UP1: 2}, tiny_llama())
        write_adapter(folder, factors, "base")
        yield {name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def folder(tmp_path: Path, saved: dict[str, bytes]) -> Path:
    for name, content in saved.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def a_key(module: str) -> str:
    return f"base_model.model.{module}.lora_A.weight"


def b_key(module: str) -> str:
    return f"base_model.model.{module}.lora_B.weight"


def refused(folder: Path) -> str:
    """The message of the refusal; it is one line that says a way out after a semicolon."""
    with pytest.raises(UserError) as error:
        read_adapter(folder)
    message = str(error.value)
    assert str(folder) in message and "; " in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.up"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 2}),
        ("arrow_config", {"top_k": 2}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "something new"),
        ("r", 0),
        ("r", None),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_(proj": 2}),
        ("rank_pattern", [2]),
        ("alpha_pattern", {"q_proj": "16"}),
        ("base_model_name_or_path", 3),
    ],
)
def test_field_is_refused_by_name_and_value(folder: Path, field: str, value: Any) -> None:
    edit(folder, **{field: value})
    assert f"{field} is {json.dumps(value)};" in refused(folder)


def test_every_refused_field_is_tested() -> None:
    (cases,) = test_field_is_refused_by_name_and_value.pytestmark
    assert adapter_config.REFUSED_FIELDS.keys() <= {field for field, _ in cases.args[1]}


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_read(folder: Path, init: Any) -> None:
    edit(folder, init_lora_weights=init)
    assert ranks(folder) == {Q0: 2, UP1: 2}


def test_a_long_value_is_shortened(folder: Path) -> None:
    edit(folder, trainable_token_indices=list(range(1000)))
    assert len(refused(folder)) < len(str(folder)) + 250


def test_unknown_fields_in_use_are_named_in_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_header(folder)
        assert caplog.text == ""
        edit(folder, use_newest=True, gamma=0.5, off=False, absent=None, empty={})
        read_header(folder)
    (record,) = caplog.records
    assert "gamma, use_newest;" in record.getMessage()
    assert "off" not in record.getMessage() and "empty" not in record.getMessage()


def _as(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_as("base_model.model.model.embed_tokens.lora_embedding_A"), "a LoRA on an embedding"),
        (_as(f"base_model.model.{Q0}.lora_magnitude_vector"), "use_dora"),
        (_as(f"base_model.model.{Q0}.lora_B.bias"), "lora_bias"),
        (_as("base_model.model.lm_head.modules_to_save.weight"), "modules_to_save"),
        (_as("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"), "trained tokens"),
        (_as("base_model.model.model.embed_tokens.weight"), "copy of the embeddings"),
        (_as("base_model.model.lm_head.weight"), "copy of the output head"),
        (_as("model.layers.0.self_attn.q_proj.lora_A.weight"), "not named base_model.model.MODULE"),
        (_as(a_key("lm_head")), "lm_head is adapted"),
        (_as(a_key("model.embed_tokens")), "model.embed_tokens is adapted"),
        (_as(a_key("model.layers.0.mlp.up_proj")), "has lora_A only"),
        (_as(a_key(Q0).replace("weight", "other.weight")), "two adapters"),
        (lambda tensors: tensors.pop(a_key(Q0)), "has lora_B only"),
        (lambda tensors: tensors.clear(), "no LoRA tensor"),
        (lambda tensors: tensors.update({a_key(Q0): torch.ones(3, 32)}), "lora_A [3, 32] and lora_B [32, 2]"),
        (lambda tensors: tensors.update({b_key(Q0): torch.ones(32, 2, 1, 1)}), "lora_B [32, 2, 1, 1]"),
        (lambda tensors: tensors.update({a_key(Q0): torch.ones(2, 0)}), "lora_A [2, 0]"),
        (lambda tensors: tensors.update({a_key(Q0): torch.ones(2, 32, dtype=torch.int8)}), "type I8"),
        (lambda tensors: tensors[a_key(Q0)].view(-1)[3].fill_(torch.nan), f"lora_A of {Q0} holds NaN"),
        (
            lambda tensors: tensors[b_key(UP1)].view(-1)[3].fill_(torch.inf),
            f"lora_B of {UP1} holds NaN or inf",
        ),
        (lambda tensors: [tensors[b_key(name)].zero_() for name in (Q0, UP1)], "it changes nothing"),
        (lambda tensors: (tensors[b_key(Q0)].zero_(), tensors[a_key(UP1)].zero_()), "it changes nothing"),
    ],
)
def test_tensors_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    retensor(folder, change)
    assert words in refused(folder)


def test_one_module_that_acts_is_enough(folder: Path) -> None:
    retensor(folder, lambda tensors: tensors[b_key(Q0)].zero_())
    assert not read_adapter(folder).factors[Q0].B.any()


@pytest.mark.parametrize("fields", [{"r": 3}, {"rank_pattern": {"q_proj": 3}}])
def test_a_rank_other_than_the_configs_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    edit(folder, **fields)
    assert f"{Q0} has rank 2, but r and rank_pattern of {CONFIG} say 3" in refused(folder)


def test_alpha_zero_is_refused(folder: Path) -> None:
    edit(folder, lora_alpha=0)
    assert "changes nothing" in refused(folder)


def test_missing_things_are_named(folder: Path) -> None:
    assert "nowhere: not a folder" in refused(folder / "nowhere")
    assert f"{CONFIG}: not a folder" in refused(folder / CONFIG)
    (folder / WEIGHTS).unlink()
    assert f"{WEIGHTS}: no such file" in refused(folder)
    (folder / CONFIG).unlink()
    assert f"{CONFIG}: no such file; give the folder" in refused(folder)


def test_adapters_in_subfolders_are_named(folder: Path) -> None:
    inner = folder / "style"
    inner.mkdir()
    (folder / CONFIG).rename(inner / CONFIG)
    assert "subfolders: style" in refused(folder)


def test_a_pickle_is_not_opened(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    message = refused(folder)
    assert "adapter_model.bin: a pickle" in message and "save_file(" in message


def test_broken_weights_are_refused(folder: Path) -> None:
    cut = (folder / WEIGHTS).read_bytes()[:-5]
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 100, cut):
        (folder / WEIGHTS).write_bytes(content)
        assert "not a readable safetensors file" in refused(folder)


@pytest.mark.parametrize(
    ("content", "words"), [(b"{", "as JSON"), (b"\xff\xfe", "as JSON"), (b"[]", "no JSON object")]
)
def test_a_broken_config_is_refused(folder: Path, content: bytes, words: str) -> None:
    (folder / CONFIG).write_bytes(content)
    assert words in refused(folder)


def test_the_header_loads_no_tensor(folder: Path) -> None:
    retensor(folder, lambda tensors: tensors[a_key(Q0)].fill_(torch.nan))
    assert read_header(folder).modules[Q0].rank == 2


# Writing under bad conditions


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


def test_names_of_older_transformers_are_those_of_now() -> None:
    former = "base_model.model.language_model.model.layers.0.mlp.up_proj.lora_{}.weight"
    assert list(factor_keys(Path("x"), [former.format(side) for side in "AB"])) == [
        "model.language_model.layers.0.mlp.up_proj"
    ]


def test_patterns_are_of_the_names_in_the_file(folder: Path) -> None:
    def former(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("base_model.model.model.", "base_model.model.language_model.model.")] = (
                tensors.pop(key)
            )

    retensor(folder, former)
    edit(folder, alpha_pattern={f"language_model.{Q0}": 3})
    modules = read_header(folder).modules
    name = f"model.language_model.{Q0.removeprefix('model.')}"
    others = {shape.scaling for module, shape in modules.items() if module != name}
    assert modules[name].scaling not in others and len(others) == 1
