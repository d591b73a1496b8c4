"""Chat formats, found by rendering."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from crosslora.config import Base
from crosslora.errors import UserError
from crosslora.models import load_format
from crosslora.text.templates import PLAIN_TEMPLATE, ChatFormat
from crosslora.text.vocabulary import Vocabulary
from tests.tiny import (
    CHATML,
    TOKENIZERS,
    byte_level_tokenizer,
    gemma_style_tokenizer,
    llama_style_tokenizer,
    tiny_llama,
)

KINDS = sorted(TOKENIZERS)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content']"
    " + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_the_tokenizers_own_template() -> None:
    tokenizer = byte_level_tokenizer()
    chat = ChatFormat(tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert tokenizer.chat_template == CHATML
    assert chat.prompt("Hi there") == "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    assert chat.pre_query == "<|im_start|>user\n"
    assert pieces(tokenizer, chat.pre_query_ids) == "<|im_start|>userĊ"
    assert chat.user_end == "<|im_end|>\n<|im_start|>assistant\n"
    assert (chat.eos_id, chat.stop_ids, chat.user_stop_ids) == (end, {end}, {end})
    assert chat.prompt_ids("Hi")[0] == start


def test_the_plain_template_for_a_base_without_one() -> None:
    tokenizer = gemma_style_tokenizer()
    chat = ChatFormat(tokenizer)
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert chat.prompt("Hi") == "<bos>User: Hi\nAssistant:\n"
    assert chat.pre_query == "<bos>User: "
    assert chat.user_end == "\nAssistant:\n"
    assert chat.eos_id == tokenizer.eos_token_id
    conversation = [
        {"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", "A"))
    ]
    assert (
        tokenizer.apply_chat_template(conversation, tokenize=False) == "<bos>S\nUser: U\nAssistant:\nA<eos>\n"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML, INSTRUCT, None])
def test_bos_is_there_once_where_the_tokenizer_wants_it(kind: str, template: str | None) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = ChatFormat(tokenizer, template).prompt_ids("Hi")
    if kind == "byte_level":
        assert tokenizer.bos_token_id is None
    else:
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML, INSTRUCT])
def test_a_saved_tokenizer_gives_the_same_prompt(kind: str, template: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    chat = ChatFormat(tokenizer, template)
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    message = [{"role": "user", "content": "Hi"}]
    encoded = saved.apply_chat_template(message, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert encoded == chat.prompt_ids("Hi")
    assert ChatFormat(saved).prompt("Hi") == chat.prompt("Hi")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML, INSTRUCT])
@pytest.mark.parametrize("user", ["Hello", "two words", "Zürich 12", '"x"', "我们"])
def test_the_pre_query_ids_begin_every_prompt(kind: str, template: str, user: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    chat = ChatFormat(tokenizer, template)
    assert chat.prompt_ids(user)[: len(chat.pre_query_ids)] == chat.pre_query_ids
    assert len(chat.pre_query_ids) >= 3
    assert chat.prompt(user) == chat.pre_query + user + chat.user_end


def test_a_space_before_the_user_stays_with_the_users_word() -> None:
    tokenizer = gemma_style_tokenizer()
    assert pieces(tokenizer, ChatFormat(tokenizer).pre_query_ids).endswith("er:")


def test_an_end_of_turn_that_is_not_eos() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    chat = ChatFormat(tokenizer)
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (chat.eos_id, chat.stop_ids, chat.user_stop_ids) == (end, {end, eos}, {end, eos})


def test_a_template_with_no_control_token_after_the_user() -> None:
    tokenizer = llama_style_tokenizer()
    chat = ChatFormat(tokenizer, INSTRUCT)
    assert chat.user_end == " [/INST]"
    assert chat.eos_id == tokenizer.eos_token_id and chat.user_stop_ids == chat.stop_ids


def test_a_template_with_no_end_falls_back_to_eos() -> None:
    tokenizer = byte_level_tokenizer()
    chat = ChatFormat(
        tokenizer, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    )
    assert chat.eos_id == tokenizer.eos_token_id and chat.stop_ids == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "cannot be rendered"),
        ("{{ raise_exception('no') }}", "cannot be rendered"),
        ("nothing", "0 times"),
        ("{{ messages[0]['content'] * 2 }}", "2 times"),
        ("{{ messages[0]['content'] | upper }}", "0 times"),
        ("{{ messages[0]['content'] }}", "assistant's text 0 times"),
    ],
)
def test_bad_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatFormat(byte_level_tokenizer(), template)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        ChatFormat(tokenizer)


def test_the_ends_of_the_generation_settings_end_a_turn_too(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    without = load_format(str(folder), Base(base=str(folder))).stop_ids
    settings = json.loads((folder / "generation_config.json").read_text())
    other = next(i for i in range(20) if i not in without)
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [*without, other]}))
    chat = load_format(str(folder), Base(base=str(folder)))
    assert chat.stop_ids == without | {other} <= chat.user_stop_ids


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_goes_on_from_its_prompt(kind: str) -> None:
    """As a fit is taught it: without the space that some tokenizers put before a text."""
    tokenizer = TOKENIZERS[kind]()
    chat, words = ChatFormat(tokenizer), Vocabulary(tokenizer)
    for answer in ("Paris", " Paris", "two words"):
        assert chat.answer_ids(answer) == [*words.encode(answer), chat.eos_id]
