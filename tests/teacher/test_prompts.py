"""Shares of strategies, and files of prompts."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslora.config import Prompts, Synthesis
from crosslora.errors import UserError
from crosslora.teacher.prompts import FilePrompts, check_prompts, counts, read_prompts
from crosslora.teacher.synthesize import max_len
from crosslora.text.templates import PLAIN_TEMPLATE, ChatFormat
from tests.tiny import byte_level_tokenizer


@given(st.integers(0, 1000), st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
def test_counts_add_up(total: int, weights: list[float]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    result = counts(total, shares)
    assert sum(result) == total
    assert all(abs(n - total * share) <= 1 for n, share in zip(result, shares, strict=True))


def test_file_prompts_go_round() -> None:
    strategy = FilePrompts(["a", "b", "c"], per_shard=2)
    assert strategy.prompts(2, 0) + strategy.prompts(2, 1) == ["a", "b", "c", "a"]


def test_a_smaller_last_shard_goes_on_where_the_others_stopped() -> None:
    strategy = FilePrompts(["a", "b", "c", "d", "e"], per_shard=2)
    assert [strategy.prompts(2, 0), strategy.prompts(2, 1), strategy.prompts(1, 2)] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]


def test_an_engine_has_room_for_the_longest_prompt_of_a_file(tmp_path: Path) -> None:
    chat = ChatFormat(byte_level_tokenizer())
    prompts = ["short", "long " * 900]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    longest = len(chat.prompt_ids(prompts[1]))
    for weight, field in (("file", "prompts_file"), ("seeds", "seeds_file")):
        settings = Synthesis(
            prompts=Prompts(**{weight: 1, field: tmp_path / "p.jsonl"}), max_response_tokens=100
        )
        assert max_len(chat, settings) >= longest + 100
    assert max_len(chat, Synthesis(max_response_tokens=100)) < longest


def test_an_engine_has_room_for_the_template() -> None:
    settings = Synthesis(max_prompt_tokens=512)
    chats = [
        ChatFormat(byte_level_tokenizer(), before + PLAIN_TEMPLATE) for before in ("", "Be brief. " * 100)
    ]
    around = [len(chat.prompt_ids("")) for chat in chats]
    assert max_len(chats[1], settings) - max_len(chats[0], settings) == around[1] - around[0] > 100


def test_a_template_without_a_beginning_gives_the_teacher_nothing_to_go_on_from() -> None:
    chat = ChatFormat(byte_level_tokenizer(), "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}")
    with pytest.raises(UserError, match="nothing before or after the user's text"):
        check_prompts(Prompts(), chat)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": "\\ud83d"}', '{"prompt": 3}', '{"prompt": " "}', '{"text": "x"}']
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_prompts(file, "prompts_file")


def test_files_that_are_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl", "seeds_file")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl", "seeds_file")
