"""Read and write PEFT LoRA folders as plain factors: dW = B @ A, the scaling already multiplied into B."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crosslora.adapter_config import CONFIG_FILE
from crosslora.adapter_header import WEIGHTS_FILE, ModuleShape, factor_keys, read_header
from crosslora.errors import UserError


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One module's update dW [d_out, d_in] = B [d_out, r] @ A [r, d_in], float32; the scaling is inside B."""

    A: torch.Tensor
    B: torch.Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            shapes = f"{tuple(self.A.shape)} and {tuple(self.B.shape)}"
            raise ValueError(f"A and B are {shapes}, not [r, d_in] and [d_out, r]")

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory: factors by module path inside the base model, sorted; `digest` as in its header.

    The factors mean the same for every kind of layer: y += x @ (B @ A).T holds for the Conv1D of GPT-2 as for
    a Linear. PEFT's `fan_in_fan_out` only says how the *base* weight is stored.
    """

    name: str
    path: Path
    base_model_name_or_path: str
    factors: dict[str, LoraFactors]
    digest: str


def read_adapter(folder: str | Path) -> Adapter:
    """Load a PEFT LoRA folder on the CPU in float32.

    Raises UserError for all that `read_header` refuses, for NaN or infinity, and where every update is zero.
    """
    header = read_header(folder)
    factors = _load_factors(header.path / WEIGHTS_FILE, header.modules)
    _check_values(header.path / WEIGHTS_FILE, factors, "give an adapter whose training succeeded")
    return Adapter(header.name, header.path, header.base_model_name_or_path, factors, header.digest)


def _load_factors(file: Path, modules: Mapping[str, ModuleShape]) -> dict[str, LoraFactors]:
    with safe_open(file, framework="pt") as tensors:
        keys = factor_keys(file, tensors.keys())
        return {
            module: LoraFactors(
                A=tensors.get_tensor(keys[module]["A"]).float(),
                B=tensors.get_tensor(keys[module]["B"]).float() * shape.scaling,
            )
            for module, shape in modules.items()
        }


def _check_values(where: Path, factors: Mapping[str, LoraFactors], way_out: str) -> None:
    for module, pair in factors.items():
        for side, tensor in (("A", pair.A), ("B", pair.B)):
            if not tensor.isfinite().all():
                raise UserError(f"{where}: lora_{side} of {module} holds NaN or infinity; {way_out}")
    if not any(pair.A.any() and pair.B.any() for pair in factors.values()):
        raise UserError(f"{where}: scaling * B @ A is zero in every module, it changes nothing; {way_out}")


def write_adapter(
    folder: str | Path,
    factors: Mapping[str, LoraFactors],
    base_model_name_or_path: str,
    revision: str | None = None,
) -> None:
    """Write a plain PEFT LoRA folder, then reopen it and compare it with `factors`.

    Alpha equals the rank in every module, so the scaling is 1. A crash leaves either the old adapter, or none, or the
    new one.
    Raises UserError where the factors are not finite or all zero, and where the folder cannot be written.
    """
    path = Path(folder)
    _check_values(path, factors, "the fit diverged or did nothing, so check its learning rate and steps")
    tensors = _tensors(factors)
    config = json.dumps(_config(factors, base_model_name_or_path, revision), indent=2, sort_keys=True)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (
            _unfinished(path / WEIGHTS_FILE) as weights_file,
            _unfinished(path / CONFIG_FILE) as config_file,
        ):
            save_file(tensors, weights_file, {"format": "pt"})
            config_file.write_text(config, encoding="utf-8")
            weights_file.chmod(config_file.stat().st_mode)  # safetensors gives 0600, whatever the umask
            _to_disk(weights_file, config_file)
            # An old config must not stand beside new weights, nor a new one beside old weights.
            (path / CONFIG_FILE).unlink(missing_ok=True)
            os.replace(weights_file, path / WEIGHTS_FILE)
            os.replace(config_file, path / CONFIG_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); free space or choose another folder"
        ) from error
    check_written(path, factors)


def _tensors(factors: Mapping[str, LoraFactors]) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, pair in factors.items():
        for side, tensor in (("A", pair.A), ("B", pair.B)):
            # safetensors refuses tensors that share memory, as views of one stacked parameter do: copy
            own = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = own
    return tensors


def _config(
    factors: Mapping[str, LoraFactors], base_model_name_or_path: str, revision: str | None
) -> dict[str, object]:
    """The fields of adapter_config.json as PEFT itself writes them, but in a fixed order.

    Modules are named by their full path: a suffix such as q_proj would also catch layers without factors, and
    those of a vision tower. PEFT matches full paths; vLLM goes by the names of the tensors.
    """
    rank = Counter(pair.rank for pair in factors.values()).most_common(1)[0][0]
    others = {f"^{re.escape(module)}": pair.rank for module, pair in factors.items() if pair.rank != rank}
    config = LoraConfig(
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        init_lora_weights=True,
    )
    return {**config.to_dict(), "target_modules": sorted(factors)}


@contextmanager
def _unfinished(file: Path) -> Iterator[Path]:
    """A name in the same folder to write under first; what still has it at the end is deleted."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)


def _to_disk(*files: Path) -> None:
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def check_written(folder: str | Path, factors: Mapping[str, LoraFactors]) -> None:
    """Reopen an adapter folder and compare it with what was written: modules, shapes and every value.

    Raises UserError where they differ, and for all that `read_adapter` refuses.
    """
    written = read_adapter(folder).factors
    if differing := ", ".join(sorted(written.keys() ^ factors.keys())):
        raise UserError(f"{folder}: holds other modules than were written ({differing}); export it again")
    for module, pair in factors.items():
        for wanted, got in ((pair.A, written[module].A), (pair.B, written[module].B)):
            if not torch.equal(wanted.detach().to("cpu", torch.float32), got):
                raise UserError(
                    f"{folder}: {module} does not read back as written; check the disk, export again"
                )
