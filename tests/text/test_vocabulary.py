"""Bytes of ids and ids of bytes, on four kinds of tokenizers."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from crosslora.errors import UserError
from crosslora.text.vocabulary import BYTE_ALPHABET, PROBES, Vocabulary, shared_tokens
from tests.tiny import (
    TEXT,
    TOKENIZERS,
    byte_level_tokenizer,
    gemma_style_tokenizer,
    tiny_tokenizer,
    unigram_tokenizer,
)

KINDS = sorted(TOKENIZERS)
CONTROL_TEXT = (
    "<|im_end|>",
    "<|im_start|>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<0x41>",
    "<0x0A>",
    "▁",
)
ANY_TEXT = st.lists(st.text() | st.sampled_from([*CONTROL_TEXT, " ", "the ", "  \n"])).map("".join)


@cache
def vocabulary(kind: str) -> Vocabulary:
    return Vocabulary(TOKENIZERS[kind]())


def joined(kind: str, ids: list[int]) -> bytes:
    return b"".join(vocabulary(kind).token_bytes[i] or b"CONTROL" for i in ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=ANY_TEXT)
def test_any_text_is_encoded_to_exactly_its_bytes(kind: str, text: str) -> None:
    ids = vocabulary(kind).encode(text)
    assert joined(kind, ids) == text.encode()
    assert vocabulary(kind).text(ids) == text
    assert vocabulary(kind).ends(ids).tolist() == np.cumsum([len(joined(kind, [i])) for i in ids]).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_added_to_a_continuation(kind: str) -> None:
    assert vocabulary(kind).encode("") == []
    assert [joined(kind, [i]) for i in vocabulary(kind).encode("Paris")] == [b"Paris"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_is_encoded_as_inside_a_longer_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    whole = tokenizer("\nThe river in Paris, two words", add_special_tokens=False)["input_ids"]
    assert whole[: len(line_end)] == line_end
    assert vocabulary(kind).encode("The river in Paris, two words") == whole[len(line_end) :]


@pytest.mark.parametrize("kind", ["byte_level", "gemma_style"])
def test_control_text_is_encoded_in_one_pass_as_plain_text(kind: str) -> None:
    for text in ("<eos><|im_end|>" + " Paris tomorrow" * n for n in range(1, 5)):
        plain = TOKENIZERS[kind]()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert vocabulary(kind).encode(text) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_stand_for_no_text(kind: str) -> None:
    tokenizer, words = TOKENIZERS[kind](), vocabulary(kind)
    assert len(words.token_bytes) == len(tokenizer)
    special = set(tokenizer.all_special_ids)
    assert special == {i for i, b in enumerate(words.token_bytes) if b is None} - (
        {tokenizer.convert_tokens_to_ids("<|im_start|>")} if kind == "byte_level" else set()
    )
    assert words.text([tokenizer.eos_token_id]) is None
    with pytest.raises(ValueError, match="stands for no text"):
        words.ends([tokenizer.eos_token_id])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [-1, 100_000])
def test_ids_outside_the_vocabulary_stand_for_no_text(kind: str, bad: int) -> None:
    assert vocabulary(kind).text([bad]) is None
    with pytest.raises(ValueError, match=str(bad)):
        vocabulary(kind).ends([bad])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_text(kind: str) -> None:
    half = vocabulary(kind).id_of[b"\xf0"]
    assert vocabulary(kind).text([half]) is None
    assert vocabulary(kind).ends([half]).tolist() == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_is_a_value_error(kind: str) -> None:
    with pytest.raises(ValueError):
        vocabulary(kind).encode("a\ud800b")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_means_the_same(kind: str, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, kind)
    assert Vocabulary(AutoTokenizer.from_pretrained(tmp_path)).token_bytes == vocabulary(kind).token_bytes


def test_the_tokenizer_itself_is_left_as_it_was() -> None:
    tokenizer = TOKENIZERS["llama_style"]()
    before = tokenizer.backend_tokenizer.to_str()
    Vocabulary(tokenizer).encode("x <s>")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer("x <s>")["input_ids"][-1] == tokenizer.bos_token_id


@pytest.mark.parametrize("kind", ["gemma_style", "llama_style"])
def test_pieces_agree_with_the_decoder(kind: str) -> None:
    tokenizer, words = TOKENIZERS[kind](), vocabulary(kind)
    for i, piece in enumerate(words.token_bytes):
        if piece is not None and piece.isascii() and not piece.startswith(b" "):
            assert tokenizer.decode([i]) == piece.decode()


def test_the_byte_alphabet_is_the_one_of_the_library() -> None:
    assert sorted(BYTE_ALPHABET) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))


def test_added_tokens_that_are_text_stand_for_their_content() -> None:
    for tokenizer in (byte_level_tokenizer(), gemma_style_tokenizer()):
        tokenizer.add_tokens(["<think>", "Grüße ganz"])
        words = Vocabulary(tokenizer)
        ids = words.encode("a <think> b Grüße ganz")
        assert words.text(ids) == "a <think> b Grüße ganz"
        assert words.token_bytes[-2:] == [b"<think>", "Grüße ganz".encode()]
        assert {len(words.token_bytes) - 1, len(words.token_bytes) - 2} <= set(ids)


def test_an_added_token_that_swallows_spaces_loses_none() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", lstrip=True, rstrip=True)])
    words = Vocabulary(tokenizer)
    assert words.text(words.encode("a  <end>  b")) == "a  <end>  b"


def test_shared_tokens_have_the_same_bytes_and_no_needless_byte_piece() -> None:
    for teacher in KINDS:
        for student in KINDS:
            table = shared_tokens(vocabulary(teacher), vocabulary(student))
            assert table.dtype == np.int32 and len(table) == len(vocabulary(teacher).token_bytes)
            for i, j in enumerate(table):
                piece = vocabulary(teacher).token_bytes[i]
                same = [
                    n for n, b in enumerate(vocabulary(student).token_bytes) if b == piece and b is not None
                ]
                assert j == -1 if not same else j in same
                if len(same) > 1:
                    assert [j] == vocabulary(student).encode((piece or b"").decode())


def test_the_letter_a_is_the_letter_and_not_its_byte_piece() -> None:
    table = shared_tokens(vocabulary("byte_level"), vocabulary("gemma_style"))
    [teacher_id] = vocabulary("byte_level").encode("a")
    tokenizer = gemma_style_tokenizer()
    assert (
        table[teacher_id] == tokenizer.convert_tokens_to_ids("a") != tokenizer.convert_tokens_to_ids("<0x61>")
    )


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_lower_casing_tokenizer_is_refused() -> None:
    for tokenizer in (byte_level_tokenizer(), gemma_style_tokenizer(), unigram_tokenizer()):
        before = tokenizer.backend_tokenizer.normalizer
        steps = [normalizers.Lowercase(), *([before] if before else [])]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        with pytest.raises(UserError, match=r"probe 'letter case' .* comes back as"):
            Vocabulary(tokenizer)


@pytest.mark.parametrize(
    ("normalizer", "probe"),
    [
        (normalizers.NFKC(), "digits"),
        (normalizers.NFD(), "letter case"),
        (normalizers.Strip(), "leading space"),
        (normalizers.Replace("\n", " "), "line ends"),
        (normalizers.BertNormalizer(False, False, False, False), None),
        (normalizers.Replace("\u00a0", " "), "unusual spaces"),
    ],
)
def test_a_normalizer_that_loses_text_is_refused(
    normalizer: normalizers.Normalizer, probe: str | None
) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    if probe is None:  # this one changes nothing at all
        Vocabulary(tokenizer)
        return
    with pytest.raises(UserError, match=f"probe '{probe}'"):
        Vocabulary(tokenizer)


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.Sequence([normalizers.NFC()])])
def test_nfc_is_left_out_and_the_bytes_stay(normalizer: normalizers.Normalizer) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    words = Vocabulary(tokenizer)
    assert words.text(words.encode("e\u0301")) == "e\u0301"


def test_a_tokenizer_with_unknown_characters_is_refused() -> None:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(special_tokens=["<unk>", "<eos>"], show_progress=False)
    )
    with pytest.raises(UserError, match="not lossless"):
        Vocabulary(wrapped(backend))


def test_a_word_level_tokenizer_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="neither byte-level nor SentencePiece-like"):
        Vocabulary(wrapped(backend))


def byte_level_without(*characters: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges that has no token for some bytes."""
    alphabet = [
        c for c, value in BYTE_ALPHABET.items() if bytes([value]) not in {c.encode() for c in characters}
    ]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrapped(backend)


def test_a_missing_control_character_is_known_and_refused_only_in_a_text() -> None:
    words = Vocabulary(byte_level_without("\x04", "\r"))
    assert words.missing_bytes == {4, 13}
    assert words.text(words.encode("a\nb")) == "a\nb"
    with pytest.raises(ValueError, match="0x04"):
        words.encode("a\x04b")


@pytest.mark.parametrize(
    ("character", "probe"), [("\n", "line ends"), ("7", "digits"), ("\t", "runs of spaces")]
)
def test_a_missing_character_of_ordinary_text_is_refused(character: str, probe: str) -> None:
    with pytest.raises(UserError, match=f"probe '{probe}'"):
        Vocabulary(byte_level_without(character))


def test_the_probes_hold_every_byte_of_utf_8() -> None:
    assert {*"".join(PROBES.values()).encode()} == {*range(256)} - {0xC0, 0xC1, *range(0xF5, 0x100)}
