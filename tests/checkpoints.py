"""What a checkpoint of a fit may hold: the learned numbers, Adam's two moments of them, the best so far, nothing else."""

import tempfile
from pathlib import Path

from crosslora.adapter import read_adapter
from crosslora.config import Config
from crosslora.projection.build import build_transfer
from crosslora.run_folder import RunFolder
from crosslora.text.pair import TokenizerPair
from crosslora.training.checkpoint import load
from crosslora.training.state import MOMENTS

HEADERS = 64 << 10
"""Bytes for names and shapes of the tensors, and for where the fit stands."""


def check_last_checkpoint(fit: RunFolder, config: Config) -> None:
    """Fails where it holds less than the fit needs to go on, or more, such as weights of the base."""
    (job,) = fit.sub("train").entries()
    inside = fit.sub(f"train/{job.base_name}")
    last = [entry.base_name for entry in inside.entries() if not entry.is_file][-1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = inside.sub(last).copy(Path(temporary) / "checkpoint")
        size = sum(file.stat().st_size for file in folder.iterdir())
        parameters, moments, best, progress = load(folder)
    learned = shapes_of_what_is_learned(config)
    assert {name: tuple(p.shape) for name, p in parameters.items()} == learned
    assert {name: tuple(p.shape) for name, p in best.items()} == learned
    assert {name: tuple(m.shape) for name, m in moments.items()} == {
        f"{name}.{key}": shape for name, shape in learned.items() for key in MOMENTS
    }
    assert progress.adam_step >= progress.step == config.fit.steps
    numbers = sum(p.numel() for p in parameters.values())
    assert size <= 4 * 4 * numbers + HEADERS


def shapes_of_what_is_learned(config: Config) -> dict[str, tuple[int, ...]]:
    pair = TokenizerPair.load(config.source, config.target)
    adapter = read_adapter(config.adapters[0].path)
    transfer = build_transfer(adapter, config.source, config.target, pair, config.fit.random_seed)
    projection = transfer.projection(residual=config.fit.residual)
    return {f"projection.{name}": tuple(p.shape) for name, p in projection.named_parameters()}
