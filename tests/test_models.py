"""What makes a base the same as before, and how it is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config

from crosslora.config import Base
from crosslora.errors import UserError
from crosslora.identity import base_identity
from crosslora.models import base_digest, embedding_place, load_model, load_tokenizer, trainable_config
from tests.tiny import tiny_llama


def test_a_base_that_was_moved_is_the_same(tmp_path: Path) -> None:
    first = tiny_llama(tmp_path / "first")
    shutil.copytree(first, tmp_path / "second")
    assert base_identity(Base(base=str(first))) == base_identity(Base(base=str(tmp_path / "second")))


def test_every_tensor_counts(tmp_path: Path) -> None:
    """A merged adapter changes some linears, wherever in the file they are."""
    folder = tiny_llama(tmp_path)
    file = folder / "model.safetensors"
    before, tensors = base_digest(str(folder)), load_file(file)
    for name in list(tensors):
        changed = tensors | {name: tensors[name] + torch.tensor(1e-3)}
        save_file(changed, file, metadata={"format": "pt"})
        assert base_digest(str(folder)) != before, name
    save_file(tensors, file, metadata={"format": "pt"})
    assert base_digest(str(folder)) == before


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    """As `git clone` leaves them without git lfs."""
    folder = tiny_llama(tmp_path)
    for file, read in (("model.safetensors", embedding_place), ("tokenizer.json", load_tokenizer)):
        (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(UserError, match=r"^base: .*cannot be (read|loaded)"):
            read(str(folder))


def test_scores_that_are_capped_are_not_left_to_a_kernel_without_the_cap(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma2Config(**size, **heads, attn_logit_softcapping=0.01)
    model: Any = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(1000)  # or no score would reach the cap
    model.save_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    capped = load_model(str(tmp_path), "float32")(ids).logits
    config.attn_logit_softcapping = 100.0
    config.save_pretrained(tmp_path)
    assert (load_model(str(tmp_path), "float32")(ids).logits - capped).abs().max() > 1e-4


def test_a_quantized_target_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    assert trainable_config(str(folder)).model_type == "llama"
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for quantized, kind in (
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
    ):
        file.write_text(json.dumps(config | {"quantization_config": quantized}))
        with pytest.raises(UserError, match=rf"target\.base: .* is quantized \({kind}\)"):
            trainable_config(str(folder))
