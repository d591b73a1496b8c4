"""TRL's trainer as the quality benchmark uses it, on tiny random models."""

from pathlib import Path

import numpy as np
import pytest
from trl.experimental.utils import encode_with_byte_offsets

from benchmarks.quality.gold import gold_trainer
from benchmarks.train_adapter import conversations, mean_loss, save
from crosslora.adapter import read_adapter
from crosslora.models import load_format, resolve
from crosslora.teacher.corpus import Sample
from tests.tiny_pair import WORDS, make_pair, tiny_config


def _sample(word: str, number: int) -> Sample:
    none = np.zeros((0, 0))
    return Sample(
        sample_id=f"{word}-{number}",
        strategy="self",
        prompt=f"Say {word} {number}",
        response=word,
        finished=True,
        response_ids=none,
        top_ids=none,
        top_logprobs=none,
        logprobs_on=none,
        logprobs_off=none,
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))


def test_the_student_comes_to_answer_as_the_teacher_does(pair: Path, tmp_path: Path) -> None:
    config = tiny_config(pair, tmp_path / "run", steps=30)
    samples = [_sample(word, number) for word in WORDS for number in range(4)]
    trainer = gold_trainer(config, samples, tmp_path, 1e-2)
    chat = load_format(resolve(config.target), config.target)
    replies = conversations([{"prompt": s.prompt, "completion": str(s.response)} for s in samples[::4]], chat)
    before = mean_loss(trainer.model, replies)
    trainer.train()
    assert mean_loss(trainer.model, replies) < before - 0.5
    save(trainer.model, config.target.base, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").factors


def test_its_alignment_by_bytes_refuses_such_a_target(pair: Path, tmp_path: Path) -> None:
    """Why the benchmark leaves it out: once TRL takes these tokenizers, it should not."""
    config = tiny_config(pair, tmp_path / "run")
    tokenizer = load_format(resolve(config.target), config.target).tokenizer
    with pytest.raises(NotImplementedError, match="ByteLevel"):
        encode_with_byte_offsets(tokenizer.backend_tokenizer, ["play some jazz"])


def test_the_teacher_is_asked_in_its_own_chat_format(pair: Path, tmp_path: Path) -> None:
    config = tiny_config(pair, tmp_path / "run")
    trainer = gold_trainer(config, [_sample("river", 1)] * 8, tmp_path, 1e-2)
    chat = load_format(resolve(config.source), config.source)
    assert set(trainer.train_dataset["original_prompt_text"]) == {chat.prompt("Say river 1")}
    assert trainer.teacher_tokenizer.eos_token_id == chat.eos_id
