"""What is known of an adapter without loading a tensor, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosslora.adapter_header import factor_keys, read_header
from tests.saved_adapter import CONFIG, Q0, UP1, WEIGHTS, a_key, b_key, edit, refused, retensor, saved_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_adapter(tmp_path)


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


def test_the_header_loads_no_tensor(folder: Path) -> None:
    retensor(folder, lambda tensors: tensors[a_key(Q0)].fill_(torch.nan))
    assert read_header(folder).modules[Q0].rank == 2


@pytest.mark.parametrize("fields", [{"r": 3}, {"rank_pattern": {"q_proj": 3}}])
def test_a_rank_other_than_the_configs_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    edit(folder, **fields)
    assert f"{Q0} has rank 2, but r and rank_pattern of {CONFIG} say 3" in refused(folder)


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
