"""The demo's source base with its adapter, for tests of what it really writes."""

from pathlib import Path

import pytest

from crosslora.config import Synthesis, load_config
from crosslora.models import load_format, resolve
from crosslora.teacher.engine import TransformersEngine
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def demo_source() -> tuple[TransformersEngine, Vocabulary, ChatFormat, Synthesis]:
    """What a prompt strategy is made from."""
    config = load_config(Path(__file__).parent.parent.parent / "examples/snips/demo.yaml")
    folder = resolve(config.source)
    chat = load_format(folder, config.source)
    engine = TransformersEngine(folder, config.adapters[0].path, dtype="float32", seed=0)
    return engine, Vocabulary(chat.tokenizer), chat, config.synthesis
