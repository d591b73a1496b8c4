"""What the ids of a tokenizer mean in bytes, and text to ids without losing a byte."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from crosslora.errors import UserError

SPACE_MARK = "▁"  # U+2581, what SentencePiece writes for a space
FALLBACK = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}

# Some byte-level vocabularies lack single bytes that next to no text holds: control characters, and what begins the
# planes from U+40000 on, where nothing is written.
RARE_BYTES = frozenset({*range(0x20), *range(0xF1, 0xF5)} - {*b"\t\n"})

PROBES = {
    "letter case": "Hello WORLD, Straße, ÀÉÎ, Ωμέγα, ДАЖЕ, İı",
    "leading space": " a",
    "trailing space": "a ",
    "runs of spaces": "a  b   c    d \t\t e     ",
    "line ends": "\n\na\r\nb\rc\n\n\n d\n",
    "digits": "0 1 12 123 1234567890 3.14159 1e-9 ½ ² ٣ ४",
    "code": 'def f(x):\n    return {"a": [x**2, -1]}  # <b>ok</b>\n\tif x != 0 && y || ~z: $p->q;',
    "punctuation": "don't we'll \"so\" “so” — – … 'n' a_b a-b (c) [d] {e} ?! @# %^ `x` \\ /",
    "CJK": "我们在这里。日本語のテキスト、한국어 문장",
    "rare CJK": "𠀀𠮷龘靐齉 㐀",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇭 ☺️",
    "combining marks": "e\u0301 a\u0308\u0323 n\u0303 \u1112\u1161\u11ab क्षि ทั้งนี้",
    "compatibility forms": "ﬁ Ａｂｃ１２３ ① ™ ㎏ ｶﾞ Å Ω",
    "right to left": "שלום עולם مرحبا بالعالم",
    "unusual spaces": "a\u00a0b\u2003c\u200bd\u3000e\u2028f\u2029g\u202fh\ufeffi\u00adj",
    "control characters": "".join(map(chr, range(0x20))) + "\x7f\x80\x85\x9f",
    "other planes": "𝔘𝕟𝕚 𐍈 𒀀 🜁 \U000e0041 \U0010fffd",
    # every byte that UTF-8 can hold, in every place it can hold it
    "all UTF-8 bytes": "".join(
        map(chr, [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x2000)])
    ),
}


class Vocabulary:
    """The bytes behind every id of one tokenizer.

    Works for byte-level BPE and for SentencePiece-like tokenizers with byte fallback; which one it is, is read from
    the tokenizer's own normalizer, pre-tokenizer and decoder. Raises UserError where neither fits or a probe text
    does not survive.

    `token_bytes[i]` is None for an id that stands for no text: special tokens, <unk>, unused ids.
    `id_of` is the way back; of several ids with the same bytes it holds the one that `encode` gives.
    `missing_bytes` are the RARE_BYTES that no id stands for: text with one of these cannot be encoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = str(tokenizer.name_or_path or type(tokenizer).__name__)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(
                f"tokenizer {self.name}: has no tokenizers backend ({type(tokenizer).__name__}); "
                "take a base with a tokenizer.json"
            )
        self._backend = continuation_backend(backend)
        self.token_bytes = _token_bytes(tokenizer, backend, self.name)
        self._lengths = np.array([-1 if b is None else len(b) for b in self.token_bytes], dtype=np.int64)
        self.missing_bytes = RARE_BYTES - {b[0] for b in self.token_bytes if b is not None and len(b) == 1}
        self._check_probes()
        self.id_of = self._ids_by_bytes()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as a continuation: no BOS, no dummy prefix, and never a special token, whatever it says.

        The bytes of the ids, joined, are exactly `text.encode()`. ValueError where that cannot be: a lone surrogate,
        or a byte of `missing_bytes`.
        """
        if (ids := self._encode_once(text)) is not None:
            return ids
        # A literal U+2581, or text that spells a control piece of a Unigram model, is lost when encoded whole:
        # halve until each part comes back right, at the end single bytes. Rare, so only right, not canonical.
        if len(text) == 1:
            return [self._byte_id(value) for value in text.encode()]
        middle = len(text) // 2
        return self.encode(text[:middle]) + self.encode(text[middle:])

    def ends(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 [n]: where each id's bytes end, counted from the first byte; ValueError on an id that has none."""
        array = np.asarray(ids, dtype=np.int64)
        known = (array >= 0) & (array < len(self._lengths))
        lengths = np.where(known, self._lengths[np.where(known, array, 0)], -1)
        if (lengths < 0).any():
            raise ValueError(f"id {array[lengths < 0][0]} of tokenizer {self.name} stands for no text")
        return np.cumsum(lengths)

    def ids_with(self, text: str) -> frozenset[int]:
        """The ids whose bytes hold the text."""
        wanted = text.encode()
        return frozenset(i for i, raw in enumerate(self.token_bytes) if raw is not None and wanted in raw)

    def text(self, ids: Iterable[int]) -> str | None:
        """The text of `ids`; None where a control id is among them or the bytes are not UTF-8."""
        try:
            joined = self._join(ids)
            return None if joined is None else joined.decode()
        except UnicodeDecodeError:
            return None

    def _byte_id(self, value: int) -> int:
        if (found := self.id_of.get(bytes([value]))) is None:
            raise ValueError(f"tokenizer {self.name} has no token for the byte 0x{value:02X}")
        return found

    def _join(self, ids: Iterable[int]) -> bytes | None:
        size = len(self.token_bytes)
        parts = [self.token_bytes[i] if 0 <= i < size else None for i in ids]
        return None if None in parts else b"".join(parts)  # type: ignore[arg-type]

    def _encode_once(self, text: str) -> list[int] | None:
        """Ids by one pass of the tokenizer, None where their bytes are not those of the text."""
        wanted = text.encode()
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids if self._join(ids) == wanted else None

    def _check_probes(self) -> None:
        for probe, whole in PROBES.items():
            text = "".join(
                character for character in whole if self.missing_bytes.isdisjoint(character.encode())
            )
            if self._encode_once(text) is None:
                raise UserError(
                    f"tokenizer {self.name}: not lossless, of the probe '{probe}' {self._difference(text)}; "
                    "take a base whose tokenizer keeps all text "
                    "(byte-level BPE, or SentencePiece with byte fallback)"
                )

    def _difference(self, text: str) -> str:
        """Where a text first comes back as another one, and as what."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        back = b"".join(self.token_bytes[i] or b"?" for i in ids).decode(errors="replace")
        at = next(
            (n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
        )
        start = max(0, at - 5)
        return f"{text[start : at + 10]!r} comes back as {back[start : at + 10]!r}"

    def _ids_by_bytes(self) -> dict[bytes, int]:
        first: dict[bytes, int] = {}
        twins = {b for i, b in enumerate(self.token_bytes) if b is not None and first.setdefault(b, i) != i}
        for twin in twins:
            try:
                ids = self._encode_once(twin.decode())
            except UnicodeDecodeError:
                continue
            if ids is not None and len(ids) == 1:
                first[twin] = ids[0]
        return first


def shared_tokens(teacher: Vocabulary, student: Vocabulary) -> np.ndarray:
    """int32 [V_teacher]: the student id with the same bytes, -1 where there is none."""
    find = student.id_of.get
    return np.array([-1 if b is None else find(b, -1) for b in teacher.token_bytes], dtype=np.int32)


def _token_bytes(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, name: str) -> list[bytes | None]:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    byte_level = _is_byte_level(backend, name)
    fallback = {} if byte_level or not FALLBACK.keys() <= vocabulary.keys() else FALLBACK
    result: list[bytes | None] = [None] * max(len(tokenizer), max(vocabulary.values(), default=-1) + 1)
    for piece, i in vocabulary.items():
        if not byte_level:
            result[i] = fallback.get(piece) or piece.replace(SPACE_MARK, " ").encode()
        elif i in added:
            result[i] = piece.encode()
        else:
            result[i] = _byte_level_bytes(piece)
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    empty = {
        vocabulary[piece] for piece in ("", getattr(backend.model, "unk_token", "")) if piece in vocabulary
    }
    for i in special | empty:
        result[i] = None
    return result


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: a printable Latin-1 byte is itself, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(v): v for v in printable} | {chr(256 + n): v for n, v in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes | None:
    try:
        return bytes([BYTE_ALPHABET[character] for character in piece])
    except KeyError:
        return None  # a piece that byte-level text can never give


def _component(part: Any) -> dict[str, Any] | None:
    """The JSON of one part of a tokenizer; of the part alone, because a whole tokenizer.json takes seconds."""
    return None if part is None else json.loads(part.__getstate__())


def _is_byte_level(backend: Tokenizer, name: str) -> bool:
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    described = json.dumps([_component(part) for part in parts], ensure_ascii=False)
    if '"ByteLevel"' in described:
        return True
    if SPACE_MARK in described:
        return False
    raise UserError(
        f"tokenizer {name}: neither byte-level nor SentencePiece-like, so its tokens cannot be read as bytes; "
        "take a base with such a tokenizer"
    )


def continuation_backend(backend: Tokenizer) -> Tokenizer:
    """A tokenizer over the same model that adds nothing to a text and reads special tokens in it as plain text."""
    shell: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": _adding_nothing(_component(backend.normalizer)),
        "pre_tokenizer": _adding_nothing(_component(backend.pre_tokenizer)),
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    result = Tokenizer.from_str(json.dumps(shell))
    result.model = backend.model  # shared, not copied: the large part
    added = backend.get_added_tokens_decoder()
    result.add_tokens([added[i] for i in sorted(added)])
    result.encode_special_tokens = True
    return result


def _adding_nothing(node: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same normalizer or pre-tokenizer without a dummy prefix.

    NFC goes too: it only rewrites text that reads the same, and the bytes of the teacher's answer must stay.
    """
    if node is None or node["type"] in ("Prepend", "NFC"):
        return None
    if node["type"] == "Sequence":
        key = "normalizers" if "normalizers" in node else "pretokenizers"
        return {**node, key: [kept for child in node[key] if (kept := _adding_nothing(child))]}
    prefix = {"prepend_scheme": "never", "add_prefix_space": False}  # of Metaspace and of ByteLevel
    return node | {key: value for key, value in prefix.items() if key in node}
