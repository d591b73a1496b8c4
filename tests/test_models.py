"""What makes a base the same as before."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from crosslora.config import Base
from crosslora.identity import base_identity
from crosslora.models import base_digest
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
