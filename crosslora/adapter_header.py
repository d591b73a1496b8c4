"""What an adapter folder holds, from its config and the head of its safetensors file; no tensor is loaded."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from crosslora.adapter_config import LoraSettings, read_settings
from crosslora.errors import UserError

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
HEADS_AND_EMBEDDINGS = frozenset(("lm_head", "embed_out", "embed_tokens", "wte"))
# The adapter's own name stands after lora_A where a whole state dict was saved.
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
_FORMER = re.compile(r"^language_model\.model\.")
"""Of bases that also see, before transformers 4.52."""
# part of a tensor's name, and what it is a sign of
_FOREIGN = {
    "lora_embedding_": "a LoRA on an embedding",
    "lora_magnitude_vector": "DoRA (use_dora)",
    ".bias": "a trained bias (bias, lora_bias)",
    "modules_to_save": "a fully trained module (modules_to_save)",
    "trainable_tokens": "a set of trained tokens (trainable_token_indices)",
    "embed_tokens.": "a full copy of the embeddings (resized vocabulary)",
    "lm_head.": "a full copy of the output head (resized vocabulary)",
}


@dataclass(frozen=True)
class ModuleShape:
    """One adapted linear layer: dW [d_out, d_in] = scaling * B [d_out, rank] @ A [rank, d_in]."""

    rank: int
    d_in: int
    d_out: int
    scaling: float


@dataclass(frozen=True)
class AdapterHeader:
    """What is known of an adapter before its tensors are loaded.

    `modules` is keyed by module path inside the base model ("model.layers.3.self_attn.q_proj"), sorted.
    `base_model_name_or_path` is "" where the config names no base. `digest` is a sha256 over both files.
    """

    name: str
    path: Path
    base_model_name_or_path: str
    modules: dict[str, ModuleShape]
    digest: str


def read_header(folder: str | Path) -> AdapterHeader:
    """Read and check one PEFT LoRA folder without loading its tensors.

    Raises UserError where anything in it cannot be moved as a plain low-rank update of linear layers.
    """
    path = Path(os.path.abspath(folder))
    settings = read_settings(path)
    weights = _find_weights(path)
    shapes = _read_shapes(weights)
    keys = factor_keys(weights, shapes)
    modules = {
        module: _module_shape(weights, settings, sides["A"], shapes[sides["A"]], shapes[sides["B"]])
        for module, sides in keys.items()
    }
    return AdapterHeader(
        name=path.name,
        path=path,
        base_model_name_or_path=settings.base_model_name_or_path,
        modules=modules,
        digest=_digest(settings.file, weights),
    )


def _find_weights(folder: Path) -> Path:
    file = folder / WEIGHTS_FILE
    if not file.is_file() and (folder / PICKLE_FILE).is_file():
        raise UserError(
            f"{folder / PICKLE_FILE}: a pickle can run code when opened, so it is not read; to convert one "
            "that you trust, run in its folder safetensors.torch.save_file("
            f"torch.load('{PICKLE_FILE}', weights_only=True), '{WEIGHTS_FILE}')"
        )
    if not file.is_file():
        raise UserError(f"{file}: no such file; copy the whole adapter folder")
    return file


def _read_shapes(file: Path) -> dict[str, list[int]]:
    """Shape of each tensor by name."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - not a mapping
            types = {key: part.get_dtype() for key, part in slices.items()}
            shapes = {key: part.get_shape() for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        way_out = "copy it again (with `git lfs pull` if it came by git)"
        raise UserError(f"{file}: not a readable safetensors file ({error}); {way_out}") from error
    for key, kind in types.items():
        if kind not in FLOAT_TYPES:
            raise UserError(
                f"{file}: {key} has type {kind}; save the adapter in float32, float16 or bfloat16"
            )
    return shapes


def factor_keys(file: Path, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Names of the tensors of each module's factors: {module: {"A": name, "B": name}}, sorted.

    Raises UserError on any tensor that is not a factor of a linear layer in the body of the model.
    """
    found: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        module, side = _parse(file, key)
        first = found.setdefault(module, {}).setdefault(side, key)
        if first != key:
            raise UserError(f"{file}: {first} and {key} are two adapters; save each in its own folder")
    for module, sides in found.items():
        if len(sides) < 2:
            raise UserError(f"{file}: {module} has lora_{min(sides)} only; copy or save the adapter again")
    if not found:
        raise UserError(f"{file}: holds no LoRA tensor; give the folder of a trained PEFT LoRA")
    return found


def _parse(file: Path, key: str) -> tuple[str, str]:
    match = _FACTOR.fullmatch(key)
    if match is None:
        signs = (meaning for part, meaning in _FOREIGN.items() if part in key)
        meaning = next(signs, "not named base_model.model.MODULE.lora_A.weight or lora_B, as PEFT does")
        raise UserError(f"{file}: tensor {key} is {meaning}; give an adapter of linear layers only")
    if match["module"].rpartition(".")[2] in HEADS_AND_EMBEDDINGS:
        raise UserError(
            f"{file}: {match['module']} is adapted, and a head or an embedding cannot be moved to another "
            "vocabulary; train the adapter without it in target_modules"
        )
    return _FORMER.sub("model.language_model.", match["module"]), match["side"]


def _module_shape(file: Path, settings: LoraSettings, key: str, a: list[int], b: list[int]) -> ModuleShape:
    """`key` is the name of A, from which the patterns of the settings take the module's."""
    module = _FACTOR.fullmatch(key)["module"]  # type: ignore[index]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
        raise UserError(
            f"{file}: {module} has lora_A {a} and lora_B {b}, not [r, d_in] and [d_out, r] of a linear "
            "layer; give an adapter of linear layers only, or save it again"
        )
    rank = settings.rank(module)
    if a[0] != rank:
        raise UserError(
            f"{file}: {module} has rank {a[0]}, but r and rank_pattern of {settings.file.name} say {rank}; "
            "use the config that was saved with these tensors"
        )
    return ModuleShape(rank, a[1], b[0], settings.scaling(module))


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
