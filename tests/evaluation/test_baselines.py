"""Adapters that nothing was trained for."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from crosslora.adapter import read_adapter
from crosslora.config import Base
from crosslora.evaluation.baselines import baseline
from crosslora.models import load_model
from crosslora.projection.build import build_transfer
from crosslora.text.pair import TokenizerPair
from tests.tiny import tiny_gemma, tiny_llama, tiny_lora


def test_random_updates_are_as_large_as_the_sources_beside_their_weights(tmp_path: Path) -> None:
    """Also where the files name tensors otherwise than the model does, as older ones do."""
    source = Base(base=str(tiny_llama(tmp_path / "source")))
    target = Base(base=str(tiny_gemma(tmp_path / "target")))
    file = tmp_path / "target/model.safetensors"
    old_names = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(old_names, file, metadata={"format": "pt"})
    adapter = read_adapter(tiny_lora(tmp_path / "adapter", tmp_path / "source"))
    transfer = build_transfer(adapter, source, target, TokenizerPair.load(source, target), 0)
    factors = baseline("random", transfer, source.base, target.base, 0)
    model = load_model(target.base, "auto")
    ratios = torch.stack(
        [
            (pair.B @ pair.A).norm() / model.get_parameter(f"{path}.weight").norm()
            for path, pair in factors.items()
        ]
    )
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    updates = [(pair.B @ pair.A).norm() for pair in adapter.factors.values()]
    weights = [
        load_model(source.base, "auto").get_parameter(f"{path}.weight").norm() for path in adapter.factors
    ]
    expected = torch.stack(updates).square().mean().sqrt() / torch.stack(weights).square().mean().sqrt()
    torch.testing.assert_close(ratios[0], expected, rtol=0.2, atol=0)


def test_cropped_onto_its_own_base_an_adapter_is_as_it_was(tmp_path: Path) -> None:
    base = Base(base=str(tiny_llama(tmp_path / "source")))
    adapter = read_adapter(tiny_lora(tmp_path / "adapter", tmp_path / "source"))
    transfer = build_transfer(adapter, base, base, TokenizerPair.load(base, base), 0)
    cropped = baseline("crop", transfer, base.base, base.base, 0)
    assert cropped.keys() == adapter.factors.keys()
    for path, own in adapter.factors.items():
        torch.testing.assert_close(cropped[path].B @ cropped[path].A, own.B @ own.A)
