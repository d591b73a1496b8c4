"""What is exported beside the factors."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from crosslora.config import Base
from crosslora.export import _where, exported_tokenizer
from crosslora.text.templates import ChatFormat
from tests.tiny import CHATML, gemma_style_tokenizer


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
    ("base", "arguments"),
    [
        (Base(base="org/model"), '"org/model"'),
        (Base(base="org/model", revision="v2"), '"org/model", revision="v2"'),
        (Base(base="/models/new.gguf"), '"/models", gguf_file="new.gguf"'),
    ],
)
def test_the_card_loads_the_base_as_transformers_does(base: Base, arguments: str) -> None:
    assert _where(base) == arguments
