"""Larger weights, larger steps."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from crosslora.config import Base, Fit
from crosslora.training.rate import REFERENCE, relative_rate, weight_rms
from tests.tiny import tiny_gemma, tiny_llama


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_the_rate_goes_with_the_root_of_the_weights(build: object, tmp_path: Path) -> None:
    folder = build(tmp_path / "base")  # type: ignore[operator]
    base, fit = Base(base=str(folder)), Fit()
    rms, rate = weight_rms(base.base), relative_rate(fit, base).learning_rate
    assert rate == pytest.approx(fit.learning_rate * (rms / REFERENCE) ** 0.5)
    file = folder / "model.safetensors"
    larger = {name: tensor * (4 if "_proj" in name else 1) for name, tensor in load_file(file).items()}
    save_file(larger, file, metadata={"format": "pt"})
    assert weight_rms(base.base) == pytest.approx(4 * rms)
    assert relative_rate(fit, base).learning_rate == pytest.approx(2 * rate)
    assert relative_rate(fit, base).steps == fit.steps
