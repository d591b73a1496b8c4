"""Loading bases: a hub id, a local folder, or a GGUF file (converted once into a folder)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from crosslora.config import Base
from crosslora.errors import UserError
from crosslora.text.templates import ChatFormat

EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def cache_folder() -> Path:
    """Where converted GGUF files are kept."""
    return Path(os.environ.get("CROSSLORA_CACHE", Path.home() / ".cache" / "crosslora"))


def resolve(base: Base, weights: bool = True) -> str:
    """What transformers and vLLM are given: a folder. Raises UserError where there is none.

    Without `weights` only configuration and tokenizer are fetched from the hub.
    """
    path = Path(base.base)
    if path.is_file() and path.suffix == ".gguf":
        return str(_converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"base: {path} holds no config.json; give the folder of a transformers model")
        return str(path)
    if path.exists() or path.is_absolute() or base.base.startswith(".") or base.base.count("/") > 1:
        raise UserError(f"base: {base.base} does not exist; give a hub id, a model folder or a GGUF file")
    return _download(base, weights)


def _converted(gguf: Path) -> Path:
    """The folder of this file as it is now: by its place, size and time. It is asked for dozens of times in a run, and
    reading all of a large file takes minutes."""
    state = gguf.stat()
    now = hashlib.sha256(f"{gguf.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    folder = cache_folder() / "gguf" / f"{gguf.stem}-{now[:16]}"
    if not (folder / "config.json").is_file():
        from crosslora.gguf import convert

        convert(gguf, folder)
    return folder


def _download(base: Base, weights: bool) -> str:
    patterns = ["*.json", "*.model", "*.jinja", "*.txt"] + ["*.safetensors"] * weights
    try:
        return snapshot_download(base.base, revision=base.revision, allow_patterns=patterns)
    except Exception as error:  # the hub client raises a different class for every cause
        raise UserError(
            f"base: {base.base} is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}); check the name, the network and your access"
        ) from error


def load_model_config(folder: str) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"base: {folder}/config.json is not usable ({str(error).splitlines()[0]})") from error
    return config


def trainable_config(folder: str) -> PretrainedConfig:
    """Of a target base; raises UserError where gradients cannot pass through its weights."""
    config = load_model_config(folder)
    if quantization := getattr(config, "quantization_config", None):
        named = quantization if isinstance(quantization, dict) else quantization.to_dict()
        kind = named.get("quant_method", "bitsandbytes")  # which did not name itself in the past
        raise UserError(
            f"target.base: {folder} is quantized ({kind}), and a fit needs its weights as they were; give the base that it "
            "was made from"
        )
    return config


def context_length(folder: str, unknown: int) -> int:
    """Positions that the base was made for; `unknown` where its configuration does not say."""
    return int(getattr(load_model_config(folder).get_text_config(), "max_position_embeddings", unknown))


def load_format(folder: str, base: Base) -> ChatFormat:
    """Tokenizer and chat template of a base, as the configuration sets them."""
    return ChatFormat(load_tokenizer(folder), base.chat_template, _generation_ends(folder))


def _generation_ends(folder: str) -> list[int]:
    """End ids of generation_config.json. vLLM stops at them too, whatever it is asked for."""
    if not (Path(folder) / "generation_config.json").is_file():
        return []
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    try:
        # mistral-common, which vLLM brings, has another tokenizer class without chat templates
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, mistral_format=False)
    # a tokenizer.json that is no JSON, such as a pointer of git lfs, raises no class of its own
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"base: the tokenizer in {folder} cannot be loaded ({reason}); save it there"
        ) from error
    return tokenizer


def load_model(folder: str, dtype: str) -> PreTrainedModel:
    """The frozen causal LM, in evaluation mode; `auto` is what its configuration says, as a rule the dtype of its
    files: then the weights are views of them, and take no memory of their own."""
    options = {"attn_implementation": "eager"} if caps_scores(load_model_config(folder)) else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    model.requires_grad_(False)
    return model.eval()


def caps_scores(config: PretrainedConfig) -> bool:
    """Whether attention scores are capped, as in Gemma 2. transformers' fused attention leaves the cap out; vLLM has it."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def base_digest(folder: str) -> str:
    """sha256 over configuration, tokenizer, and the weights' headers and the beginning of every tensor.

    Reading 140 GB to the last byte would take longer than many a stage; training, and merging an adapter, change numbers
    all over a tensor.
    """
    sha = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".safetensors":
            _add_beginnings(sha, path)
        elif path.name in ("config.json", "tokenizer.json", "generation_config.json"):
            sha.update(path.read_bytes())
    return sha.hexdigest()


def _add_beginnings(sha: hashlib._Hash, path: Path, size: int = 1 << 14) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        sha.update(header)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for begin, end in sorted(tensor["data_offsets"] for tensor in tensors.values()):
            file.seek(8 + length + begin)
            sha.update(file.read(min(size, end - begin)))


def embedding_rows(folder: str, ids: torch.Tensor) -> torch.Tensor:
    """Input embeddings [n, hidden] of `ids` in float32, read without loading the rest of the model."""
    path, name = embedding_place(folder)
    with safe_open(path, framework="pt") as tensors:
        rows: torch.Tensor = tensors.get_tensor(name)[ids].float()
        return rows


def embedding_place(folder: str) -> tuple[Path, str]:
    """File and name of the input embeddings; raises UserError where the folder holds no such safetensors file."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                name = next((name for name in tensors.keys() if name.endswith(EMBEDDING_NAMES)), None)  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"base: {path} cannot be read ({error}); copy it again, whole (after `git clone`: git lfs pull)"
            ) from error
        if name is not None:
            return path, name
    raise UserError(
        f"base: {folder} has no safetensors file with an embedding table; convert it with save_pretrained"
    )
