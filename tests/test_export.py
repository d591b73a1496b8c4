"""What is exported beside the factors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from transformers import AutoTokenizer

from crosslora.adapter import read_adapter
from crosslora.config import Base, Config
from crosslora.errors import UserError
from crosslora.export import _where, export, exported_tokenizer
from crosslora.projection.build import build_transfer, projection_from
from crosslora.projection.projection import Projection
from crosslora.run_folder import RunFolder
from crosslora.text.pair import TokenizerPair
from crosslora.text.templates import ChatFormat
from crosslora.training.checkpoint import LEARNED, START
from tests.tiny import CHATML, gemma_style_tokenizer
from tests.tiny_pair import make_pair, tiny_config


def test_the_end_that_the_student_learned_is_the_eos_of_the_folder(tmp_path: Path) -> None:
    """A base whose EOS is not what its template writes after an answer."""
    tokenizer = gemma_style_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own = tokenizer.eos_token_id
    chat = ChatFormat(tokenizer, CHATML)
    assert chat.eos_id != own
    exported_tokenizer(chat).save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.eos_token_id == chat.eos_id and read.chat_template == chat.tokenizer.chat_template
    assert tokenizer.eos_token_id == own, "the tokenizer in use stays as it is"


@pytest.mark.parametrize(
    ("base", "capped", "arguments"),
    [
        (Base(base="org/model"), False, '"org/model"'),
        (Base(base="org/model"), True, '"org/model", attn_implementation="eager"'),
        (Base(base="org/model", revision="v2"), False, '"org/model", revision="v2"'),
        (Base(base="/models/new.gguf"), False, '"/models", gguf_file="new.gguf"'),
    ],
)
def test_the_card_loads_the_base_as_the_fit_did(base: Base, capped: bool, arguments: str) -> None:
    assert _where(base, capped) == arguments


def learned_elsewhere(config: Config) -> tuple[dict[str, torch.Tensor], Projection]:
    """A start in another basis than this machine would choose, and a projection that learned something from it."""
    torch.manual_seed(0)
    adapter = read_adapter(config.adapters[0].path)
    pair = TokenizerPair.load(config.source, config.target)
    start = build_transfer(adapter, config.source, config.target, pair, 0).start()
    for name in [name for name in start if name.endswith("coordinates")]:
        turned, _ = torch.linalg.qr(torch.randn(len(start[name]), len(start[name])))
        start[name] = turned @ start[name]
    projection = projection_from(start, adapter, config.source, config.target, residual=True)
    for parameter in projection.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return start, projection


def test_what_was_learned_is_exported_in_the_basis_that_it_was_learned_in(tmp_path: Path) -> None:
    config = tiny_config(make_pair(tmp_path / "pair"), tmp_path / "run")
    start, projection = learned_elsewhere(config)
    folder, adapter = RunFolder.open(config.run), read_adapter(config.adapters[0].path)
    fitted, exported = folder.stage("fit/tiny", {}), folder.stage("export/tiny", {})
    fitted.finish({"held_out_loss": 1.0, "best_step": 12})
    learned = {f"projection.{name}": p.detach() for name, p in projection.named_parameters()}
    folder.write_bytes(f"fit/tiny/{LEARNED}", save(learned))
    with pytest.raises(UserError, match=rf"{START}: is missing; add --redo fit"):
        export(config, adapter, fitted, exported, {"counts": {"kept": 1}})
    folder.write_bytes(f"fit/tiny/{START}", save(start))
    export(config, adapter, fitted, exported, {"counts": {"kept": 1}})
    written = read_adapter(tmp_path / "run/export/tiny").factors
    for path, factors in projection.lora_factors().items():
        torch.testing.assert_close(written[path].B @ written[path].A, factors.B @ factors.A)
