import os
import shutil
import socket
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer

from crosslora import gguf
from crosslora.config import Base
from crosslora.errors import UserError
from crosslora.models import resolve

WIDTH, HEADS, LAYERS, MLP = 32, 4, 2, 64


def write_tiny_llama(path: Path, adds_bos: bool | None = True, norm: float = 1.0, without: str = "") -> Path:
    """A random Llama, byte-level BPE of single characters; ``adds_bos`` None leaves the rule out."""
    tokens = ["<|endoftext|>", "<s>", "</s>", *string.ascii_letters, "ab", "Ġ"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    shapes = tensor_shapes(len(tokens))
    shapes.pop(without, None)
    for name, shape in shapes.items():
        values = np.full(shape, norm) if len(shape) == 1 else np.random.default_rng(0).normal(0, 0.2, shape)
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensor_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        block = {
            "attn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (MLP, WIDTH),
            "ffn_up": (MLP, WIDTH),
            "ffn_down": (WIDTH, MLP),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(("adds_bos", "first"), [(True, [1]), (False, []), (None, [])])
def test_conversion_is_readable_and_keeps_the_bos_rule(
    tmp_path: Path, adds_bos: bool | None, first: list[int]
) -> None:
    folder = tmp_path / "models" / "tiny"
    gguf.convert(write_tiny_llama(tmp_path / "tiny.gguf", adds_bos), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer("hello", add_special_tokens=False).input_ids
    assert tokenizer("hello").input_ids == first + plain
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    expected = np.random.default_rng(0).normal(0, 0.2, (len(tokenizer), WIDTH))
    assert torch.allclose(
        model.get_input_embeddings().weight.float(), torch.tensor(expected).float(), atol=2e-3
    )
    assert not list(tmp_path.glob("tiny.part*"))


def test_finished_folder_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    gguf.convert(tiny, folder)
    before = (folder / gguf.MARKER).stat().st_mtime_ns
    gguf.convert(tiny, folder)
    assert (folder / gguf.MARKER).stat().st_mtime_ns == before
    other = write_tiny_llama(tmp_path / "other.gguf", adds_bos=False)
    with pytest.raises(UserError, match="conversion of another file"):
        gguf.convert(other, folder)


def test_a_base_is_read_and_converted_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSLORA_CACHE", str(tmp_path / "cache"))
    base = Base(base=str(shutil.copy(tiny, tmp_path / "model.gguf")))
    folder = resolve(base)
    assert AutoTokenizer.from_pretrained(folder)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_digest", lambda path: pytest.fail("the whole file is read again"))
        assert resolve(base) == folder
    write_tiny_llama(Path(base.base), adds_bos=False)
    assert resolve(base) != folder


def test_leftovers_of_killed_conversions_are_removed_and_others_go_on(tiny: Path, tmp_path: Path) -> None:
    here = f"out.part-{socket.gethostname()}"
    killed = [tmp_path / f"{here}-{2**22 + 1}", tmp_path / f"{here}-{os.getpid()}"]
    others = [
        tmp_path / f"{here}-{os.getppid()}",
        tmp_path / "out.part-elsewhere-7",
        tmp_path / f"{here}-copy",
    ]
    for part in (*killed, *others):
        part.mkdir()
        (part / "junk").write_text("half")
    gguf.convert(tiny, tmp_path / "out")
    assert not any(part.exists() for part in killed) and all((part / "junk").exists() for part in others)


def test_folder_with_other_content_is_refused_and_kept(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a finished conversion"):
        gguf.convert(tiny, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_bad_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        gguf.convert(tmp_path / "absent.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="expected 00"):
        gguf.convert(tiny, tmp_path / "out", sha256="00")
    text = tmp_path / "text.gguf"
    text.write_text("not a model at all, only some text that is long enough")
    with pytest.raises(UserError, match="not a readable GGUF file"):
        gguf.convert(text, tmp_path / "out")
    for share in (0.5, 0.01, 0):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(tiny.read_bytes()[: int(tiny.stat().st_size * share)])
        with pytest.raises(UserError, match="not a readable GGUF file"):
            gguf.convert(cut, tmp_path / "out")


def test_small_disk_is_refused_before_loading(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="1 MiB free"):
        gguf.convert(tiny, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_model_that_does_not_work_is_not_left_behind(tmp_path: Path) -> None:
    broken = write_tiny_llama(tmp_path / "broken.gguf", norm=float("nan"))
    with pytest.raises(UserError, match="not finite"):
        gguf.convert(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    partial = write_tiny_llama(tmp_path / "partial.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(UserError, match=r"weights are missing.*layers\.1\.mlp\.up_proj"):
        gguf.convert(partial, tmp_path / "out")
