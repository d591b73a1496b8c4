"""Turns a GGUF file into a local Hugging Face folder in bfloat16, once."""

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import torch
import transformers
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from crosslora import __version__
from crosslora.errors import UserError

MARKER = "crosslora-conversion.json"
PROBE = "The capital of France is"


def convert(gguf_path: Path, folder: Path, sha256: str | None = None) -> None:
    """Write the model and the tokenizer of a GGUF file into ``folder``: dequantised, as bfloat16.

    ``sha256`` is the digest that the file must have. A folder that holds this conversion already is left
    alone. The folder appears whole or not at all: all is written beside it, tried, then renamed.
    The file's BOS rule is ``tokenizer.ggml.add_bos_token``; transformers drops it, so it is put back.

    Raises UserError: a file that is missing, damaged, of an unknown kind or not the expected one, a folder
    that holds something else, a disk too small, a converted model that does not work.
    """
    digest = _digest(gguf_path)
    if sha256 is not None and digest != sha256:
        raise UserError(f"{gguf_path}: its sha256 is {digest}, expected {sha256}; get the file again")
    if _is_done(folder, digest):
        return
    reader = _read(gguf_path)
    folder = folder.absolute()
    # another process, or a host with the same cache, may convert the same file
    part = folder.with_name(f"{folder.name}.part-{socket.gethostname()}-{os.getpid()}")
    try:
        _make_room(part, weight_bytes=2 * sum(int(tensor.n_elements) for tensor in reader.tensors))
        with _parsed_once(reader):
            model, tokenizer = _load(gguf_path)
        model.save_pretrained(part)
        tokenizer.add_bos_token = _adds_bos(reader)
        tokenizer.save_pretrained(part)
        _try(part, adds_bos=_adds_bos(reader))
        marker = {"source": gguf_path.name, "source_sha256": digest, "crosslora": __version__}
        (part / MARKER).write_text(json.dumps(marker | {"transformers": transformers.__version__}) + "\n")
        part.rename(folder)
    except OSError as error:
        if folder.is_dir() and _is_done(folder, digest):
            return  # another process was faster
        raise UserError(f"{folder}: cannot be written, {error}; choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give the path of a GGUF file")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {error}; check its permissions") from error


def _is_done(folder: Path, digest: str) -> bool:
    marker = folder / MARKER
    if marker.is_file():
        found = json.loads(marker.read_text())["source_sha256"]
        if found != digest:
            raise UserError(
                f"{folder}: holds the conversion of another file (sha256 {found}); choose another folder"
            )
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: exists and is not a finished conversion; remove it or choose another folder"
        )
    return False


def _read(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: not a readable GGUF file, {error}; get the file again") from error


def _adds_bos(reader: GGUFReader) -> bool:
    """The file's rule; without one llama.cpp's default: a SentencePiece vocabulary ("llama") wants BOS."""
    rule = reader.get_field("tokenizer.ggml.add_bos_token")
    if rule is not None:
        return bool(rule.contents())
    kind = reader.get_field("tokenizer.ggml.model")
    return kind is not None and kind.contents() == "llama"


def _make_room(part: Path, weight_bytes: int) -> None:
    of_this_host = part.name.rpartition("-")[0]
    for other in part.parent.glob(f"{glob.escape(of_this_host)}-*"):
        pid = other.name.rpartition("-")[2]
        if other == part or (pid.isdigit() and not Path(f"/proc/{pid}").exists()):
            shutil.rmtree(other, ignore_errors=True)  # what a killed conversion left
    part.mkdir(parents=True)
    needed = weight_bytes + (1 << 27)  # a tokenizer of 262k entries takes 33 MB
    free = shutil.disk_usage(part).free
    if free < needed:
        raise UserError(
            f"{part.parent}: {free >> 20} MiB free, the conversion needs {needed >> 20} MiB; free some space"
        )


@contextmanager
def _parsed_once(reader: GGUFReader) -> Iterator[None]:
    """transformers parses the file anew for tokenizer, configuration and weights: 10 s each at 262k entries."""
    gguf.GGUFReader = lambda path: reader
    try:
        yield
    finally:
        gguf.GGUFReader = GGUFReader


def _load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(
                dequantize=True
            ),  # else some stay packed where kernels are installed
            output_loading_info=True,
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"{path}: transformers cannot load this model, {error}; use a Hugging Face folder"
        ) from error
    if info["missing_keys"]:
        raise UserError(
            f"{path}: weights are missing, {sorted(info['missing_keys'])}; use a Hugging Face folder"
        )
    return model, tokenizer


def _try(folder: Path, adds_bos: bool) -> None:
    """The folder as it will be read: the BOS rule, a lossless tokenizer, a generation with finite logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    inputs = tokenizer(PROBE, return_tensors="pt")
    ids = inputs.input_ids[0]
    if (int(ids[0]) == tokenizer.bos_token_id) != adds_bos:
        raise UserError(f"{folder}: encoded text begins with id {int(ids[0])}, against the file's BOS rule")
    if tokenizer.decode(ids, skip_special_tokens=True).strip() != PROBE:
        raise UserError(
            f"{folder}: the converted tokenizer does not give a text back; use a Hugging Face folder"
        )
    with torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        finite = bool(model(answer).logits.isfinite().all())
    if not finite:
        raise UserError(
            f"{folder}: the converted model gives logits that are not finite; use a Hugging Face folder"
        )
    tokenizer.decode(answer[0])
