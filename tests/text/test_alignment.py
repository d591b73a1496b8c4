"""Alignment on bytes: strict positions and the targets built on them."""

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from crosslora.text.alignment import Targets, build_targets, coverage, strict_positions
from crosslora.text.vocabulary import Vocabulary, shared_tokens
from tests.tiny import TOKENIZERS

PAIRS = list(itertools.product(sorted(TOKENIZERS), repeat=2))
ANY_TEXT = st.lists(
    st.text(max_size=12) | st.sampled_from(["the ", "Paris", " 我们", "▁", "é", "👩‍👩‍👧"])
).map("".join)
K = 8


@cache
def words(kind: str) -> Vocabulary:
    return Vocabulary(TOKENIZERS[kind]())


@cache
def eos(kind: str) -> int:
    found: int = TOKENIZERS[kind]().eos_token_id
    return found


@cache
def table(teacher: str, student: str) -> np.ndarray:
    return shared_tokens(words(teacher), words(student))


def segment(kind: str, text: str, random: np.random.Generator) -> list[int]:
    """A random way to write the text in the tokens of this vocabulary: it can split characters."""
    data, at, ids = text.encode(), 0, []
    while at < len(data):
        choices = [i for n in range(1, 13) if (i := words(kind).id_of.get(data[at : at + n])) is not None]
        ids.append(int(random.choice(choices[: len(data) - at])))
        at += len(words(kind).token_bytes[ids[-1]] or b"")
    return ids


def top_k(kind: str, ids: list[int], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random entries, distinct in a row as those of a teacher, the realised id at a random place."""
    vocabulary = len(words(kind).token_bytes)
    top = np.array([random.permutation(vocabulary)[:K] for _ in ids])
    for row, i in enumerate(ids):
        if i not in top[row]:
            top[row, random.integers(K)] = i
    mass = random.dirichlet(np.full(K + 1, 0.5), len(ids))[:, :K] + 1e-6
    return top, np.log(mass).astype(np.float32)


def targets(
    teacher: str, student: str, ids: list[int], top: np.ndarray, logprobs: np.ndarray, /, **more: object
) -> Targets:
    settings: dict = {
        "teacher": words(teacher),
        "student": words(student),
        "table": table(teacher, student),
        "teacher_stop_ids": frozenset({eos(teacher)}),
        "student_eos": eos(student),
    }
    return build_targets(ids, top, logprobs, **(settings | more))


def spans(ends: np.ndarray) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *ends.tolist()]))


cuts = st.sets(st.integers(1, 60)).map(lambda inner: np.array(sorted({*inner, 61})))


@given(teacher=cuts, student=cuts)
def test_strict_positions_are_all_equal_spans_in_order(teacher: np.ndarray, student: np.ndarray) -> None:
    i, j = strict_positions(teacher, student)
    wanted = [(a, b) for a, s in enumerate(spans(teacher)) for b, t in enumerate(spans(student)) if s == t]
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == wanted
    assert (np.diff(i) > 0).all() and (np.diff(j) > 0).all()


def test_strict_positions_of_no_text() -> None:
    none = np.array([], dtype=np.int64)
    assert [len(found) for found in strict_positions(none, none)] == [0, 0]


def test_two_texts_do_not_align() -> None:
    with pytest.raises(ValueError, match="not the same text: 3 bytes and 4 bytes"):
        strict_positions(np.array([1, 3]), np.array([4]))


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@given(text=ANY_TEXT, seed=st.integers(0, 2**32 - 1), canonical=st.booleans())
def test_targets_of_any_text_in_any_segmentation(
    teacher: str, student: str, text: str, seed: int, canonical: bool
) -> None:
    random = np.random.default_rng(seed)
    content = words(teacher).encode(text) if canonical else segment(teacher, text, random)
    ids = [*content, eos(teacher)]
    top, logprobs = top_k(teacher, ids, random)
    found = targets(teacher, student, ids, top, logprobs)

    own = words(student).encode(text)
    assert found.student_ids.tolist() == [*own, eos(student)]
    assert (found.top_ids.dtype, found.top_logprobs.dtype) == (np.int32, np.float32)
    assert found.top_ids.shape == found.top_logprobs.shape == (len(own) + 1, K)
    assert found.strict[-1]
    assert ((found.top_ids == -1) == np.isneginf(found.top_logprobs)).all()
    assert (found.top_ids[~found.strict] == -1).all()
    assert (np.exp(found.top_logprobs).sum(axis=1) <= 1 + 1e-4).all()
    teacher_spans = {span: row for row, span in enumerate(spans(words(teacher).ends(content)))}
    student_spans = spans(words(student).ends(own))
    for row in np.flatnonzero(found.strict[:-1]):
        check_row(teacher, student, found, row, top, logprobs, teacher_spans[student_spans[row]], ids)
    if teacher == student and canonical:
        assert targets(teacher, student, ids, top, logprobs, min_mapped_mass=0).strict.all()


def check_row(
    teacher: str,
    student: str,
    found: Targets,
    row: int,
    top: np.ndarray,
    logprobs: np.ndarray,
    at: int,
    ids: list[int],
) -> None:
    """Every entry of a strict row has the bytes and the probability of teacher entries; the realised one is there."""
    entries = {
        int(i): float(p) for i, p in zip(found.top_ids[row], found.top_logprobs[row], strict=True) if i >= 0
    }
    assert len(entries) == (found.top_ids[row] >= 0).sum()
    assert int(found.student_ids[row]) in entries
    assert words(teacher).token_bytes[ids[at]] == words(student).token_bytes[found.student_ids[row]]
    wanted: dict[bytes | None, float] = {}
    for i, p in zip(top[at].tolist(), logprobs[at].tolist(), strict=True):
        name = b"END" if i == eos(teacher) else words(teacher).token_bytes[i]
        if name == b"END" or name in words(student).id_of:
            wanted[name] = float(np.logaddexp(wanted.get(name, -np.inf), p))
    got = {b"END" if i == eos(student) else words(student).token_bytes[i]: p for i, p in entries.items()}
    assert got == pytest.approx(wanted, abs=1e-5)
    assert np.exp(found.top_logprobs[row]).sum() >= 0.5


def row_of(kind: str, *pieces: str | int) -> list[int]:
    return [p if isinstance(p, int) else words(kind).id_of[p.encode()] for p in pieces]


def test_a_small_example() -> None:
    end = eos("byte_level")
    ids = row_of("byte_level", "a", "!", end)
    rows = [
        row_of("byte_level", "a", "b", end),
        row_of("byte_level", "?", "!", "ü"),
        row_of("byte_level", "b", "c", end),
    ]
    logprobs = np.log(np.array([[0.5, 0.25, 0.125], [0.4, 0.3, 0.2], [0.1, 0.1, 0.2]], dtype=np.float32))
    found = targets("byte_level", "gemma_style", ids, np.array(rows), logprobs)
    student_end = eos("gemma_style")
    assert found.student_ids.tolist() == row_of("gemma_style", "a", "!", student_end)
    assert found.top_ids.tolist() == [
        row_of("gemma_style", "a", "b", student_end),
        row_of("gemma_style", "?", "!", "ü"),
        row_of("gemma_style", "b", "c", student_end),
    ]
    assert found.top_logprobs == pytest.approx(logprobs)
    assert found.strict.tolist() == [True, True, True]


def test_a_token_that_the_student_splits_is_no_strict_position() -> None:
    words_of_teacher = ["He", "ll", "o", "!"]
    student_pieces = [words("byte_level").token_bytes[i] for i in words("byte_level").encode("Hello!")]
    assert student_pieces == [b"H", b"ell", b"o", b"!"]
    i, j = strict_positions(
        np.cumsum([len(w) for w in words_of_teacher]),
        words("byte_level").ends(words("byte_level").encode("Hello!")),
    )
    assert (i.tolist(), j.tolist()) == ([2, 3], [2, 3])


def test_stop_ids_are_one_end_in_every_row() -> None:
    start, end = TOKENIZERS["byte_level"]().convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = [*words("byte_level").encode("a"), start]
    [letter] = words("byte_level").encode("a")
    top = np.array([[end, letter, start], [start, letter, end]])
    logprobs = np.log(np.array([[0.25, 0.5, 0.125], [0.3, 0.2, 0.1]], dtype=np.float32))
    found = targets("byte_level", "unigram", ids, top, logprobs, teacher_stop_ids=frozenset({start, end}))
    student_a, student_end = words("unigram").id_of[b"a"], eos("unigram")
    assert found.top_ids.tolist() == [[student_end, student_a, -1], [student_end, student_a, -1]]
    assert np.exp(found.top_logprobs) == pytest.approx(np.array([[0.375, 0.5, 0], [0.4, 0.2, 0]]))


def test_a_row_with_too_little_mass_is_cross_entropy_but_not_the_end() -> None:
    ids = [*words("byte_level").encode("a"), eos("byte_level")]
    top, logprobs = np.array([[i] for i in ids]), np.log(np.array([[0.45], [0.1]], dtype=np.float32))
    assert targets("byte_level", "unigram", ids, top, logprobs).strict.tolist() == [False, True]
    assert targets("byte_level", "unigram", ids, top, logprobs, min_mapped_mass=0.4).strict.tolist() == [
        True,
        True,
    ]


def test_twins_of_a_byte_become_one_entry_under_the_id_of_the_text() -> None:
    tokenizer = TOKENIZERS["gemma_style"]()
    letter, byte = tokenizer.convert_tokens_to_ids(["a", "<0x61>"])
    ids = [byte, eos("gemma_style")]
    top = np.array([[letter, byte], [eos("gemma_style"), letter]])
    logprobs = np.log(np.array([[0.5, 0.25], [0.5, 0.25]], dtype=np.float32))
    found = targets("gemma_style", "gemma_style", ids, top, logprobs)
    assert found.student_ids.tolist() == [letter, eos("gemma_style")]
    assert found.top_ids[0].tolist() == [letter, -1]
    assert np.exp(found.top_logprobs[0]) == pytest.approx([0.75, 0])


def test_the_generated_token_is_among_the_entries_under_the_id_that_the_text_has() -> None:
    tokenizer = TOKENIZERS["byte_level"]()
    plain = tokenizer.convert_tokens_to_ids("Ġth")
    tokenizer.add_tokens([AddedToken(" th", single_word=True, normalized=False)])  # a twin for the word alone
    student, teacher = Vocabulary(tokenizer), words("byte_level")
    assert student.encode(" th") == [len(tokenizer) - 1] and student.encode(" thy")[0] == plain
    ids = [*teacher.encode(" thy"), eos("byte_level")]
    top, logprobs = np.array([[i] for i in ids]), np.full((len(ids), 1), -0.1)
    shared = shared_tokens(teacher, student)
    found = targets("byte_level", "byte_level", ids, top, logprobs, student=student, table=shared)
    assert found.top_ids[:, 0].tolist() == found.student_ids.tolist() == ids


def test_absent_entries_and_rows_beyond_the_vocabulary_map_to_nothing() -> None:
    [letter] = words("byte_level").encode("a")
    ids = [letter, eos("byte_level")]
    top = np.array([[letter, -1, 99_999], [eos("byte_level"), letter, letter + 1]])
    logprobs = np.array([[-0.1, -np.inf, -3.0], [-0.1, -np.inf, -4.0]], dtype=np.float32)
    found = targets("byte_level", "llama_style", ids, top, logprobs)
    assert (found.top_ids[:, 1] == -1).all() and found.top_ids[0, 2] == -1
    assert found.strict.all()


def test_an_answer_of_an_end_alone() -> None:
    found = targets("unigram", "byte_level", [2], np.array([[2, 7]]), np.array([[-0.5, -1.0]]))
    assert found.student_ids.tolist() == [eos("byte_level")] and found.strict.tolist() == [True]


def half_character() -> list[int]:
    return [words("byte_level").id_of[b"\xf0"], eos("byte_level")]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "stop id"),
        (words("byte_level").encode("a"), "stop id"),
        (half_character(), "stop id"),
        ([eos("byte_level"), eos("byte_level")], "stop id"),
    ],
)
def test_what_is_no_finished_text_is_refused(ids: list[int], message: str) -> None:
    top = np.array([[i] for i in ids], dtype=np.int64).reshape(len(ids), 1)
    with pytest.raises(ValueError, match=message):
        targets("byte_level", "unigram", ids, top, np.zeros(top.shape))


def test_a_row_without_its_generated_id_is_refused() -> None:
    ids = [*words("byte_level").encode("a"), eos("byte_level")]
    with pytest.raises(ValueError, match="not among the entries"):
        targets("byte_level", "unigram", ids, np.array([[ids[0]], [ids[0]]]), np.zeros((2, 1)))


def test_coverage_counts_rows() -> None:
    def one(*strict: bool) -> Targets:
        rows = np.zeros((len(strict), 1))
        return Targets(rows[:, 0], rows, rows, np.array(strict))

    assert coverage([one(True, False, False), one(True)]) == 0.5
    assert coverage(iter([])) == 0
