"""The teacher's distributions at the student's tokens, aligned on bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from crosslora.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Targets:
    """What the student learns from one response of m of its tokens and an end: M = m + 1 rows, k entries each."""

    student_ids: np.ndarray  # int32 [M], the last one is the student's EOS
    top_ids: np.ndarray  # int32 [M, k], the teacher's top-k as student ids, -1 where there is no such entry
    top_logprobs: np.ndarray  # float32 [M, k], the teacher's log p of these, -inf where the id is -1
    strict: np.ndarray  # bool [M], True: KL to the top-k and a tail; False: cross-entropy on student_ids


def strict_positions(teacher_ends: np.ndarray, student_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (i, j), rising, of a teacher and a student token that cover the same bytes of one text.

    Both arguments are cumulative byte ends, strictly rising. ValueError where they do not end at the same byte.
    """
    if (total := _last(teacher_ends)) != _last(student_ends):
        raise ValueError(f"not the same text: {total} bytes and {_last(student_ends)} bytes")
    student_at = np.full(total + 1, -1, dtype=np.int64)
    student_at[student_ends] = np.arange(len(student_ends))
    pairs = student_at[teacher_ends]  # for each teacher token the student token that ends where it ends
    same = (pairs >= 0) & (_starts(teacher_ends)[:-1] == _starts(student_ends)[pairs])
    return np.flatnonzero(same), pairs[same]


def build_targets(
    response_ids: Sequence[int] | np.ndarray,
    top_ids: np.ndarray,
    top_logprobs: np.ndarray,
    *,
    teacher: Vocabulary,
    student: Vocabulary,
    table: np.ndarray,
    teacher_stop_ids: frozenset[int],
    student_eos: int,
    min_mapped_mass: float = 0.5,
) -> Targets:
    """Targets of one finished response.

    response_ids [n]: what the teacher generated, as it is, the last one a stop id. top_ids, top_logprobs [n, k]: its
    distribution at each of these, the generated id always among them, -1 or -inf where there is no entry.
    table: `shared_tokens(teacher, student)`.

    A row is strict where a student token covers exactly the bytes of a teacher token and at least `min_mapped_mass`
    of the probability is on entries that the student has too. The row of the end always is. Teacher stop ids count
    as the student's EOS in every row. Entries that become one student id become one entry, probabilities added.

    ValueError: no stop id at the end, bytes that are no text, or a generated id that is not in its row.
    """
    generated = np.asarray(response_ids, dtype=np.int64)
    top_ids, top_logprobs = np.asarray(top_ids), np.asarray(top_logprobs, dtype=np.float32)
    text = teacher.text(generated[:-1].tolist())
    if text is None or not len(generated) or int(generated[-1]) not in teacher_stop_ids:
        raise ValueError("a response must be text that ends with a stop id: filter the corpus")
    content = student.encode(text)
    student_ids = np.array([*content, student_eos], dtype=np.int32)
    rows, columns = strict_positions(teacher.ends(generated[:-1]), student.ends(content))
    rows, columns = np.append(rows, len(generated) - 1), np.append(columns, len(content))

    realised = (top_ids[rows] == generated[rows, None]) & np.isfinite(top_logprobs[rows])
    if not realised.any(axis=1).all():
        raise ValueError("a generated id is not among the entries of its row")
    ids, logprobs = _mapped(top_ids[rows], top_logprobs[rows], table, teacher_stop_ids, student_eos)
    # of several student ids with these bytes, the one that this text was encoded with
    ids, logprobs = (
        np.where(realised, student_ids[columns, None], ids),
        np.where(realised, top_logprobs[rows], logprobs),
    )
    ids, logprobs = _merged(ids, logprobs)
    good = np.exp(logprobs).sum(axis=1) >= min_mapped_mass
    good[-1] = True
    return _scatter(student_ids, columns[good], ids[good], logprobs[good])


def coverage(targets: Iterable[Targets]) -> float:
    """The share of the students' response rows that get a teacher distribution; 0 where there is no row."""
    counts = [(int(t.strict.sum()), len(t.strict)) for t in targets]
    return sum(strict for strict, _ in counts) / max(1, sum(rows for _, rows in counts))


def _last(ends: np.ndarray) -> int:
    return int(ends[-1]) if len(ends) else 0


def _starts(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], ends]).astype(
        np.int64
    )  # one longer than ends: index -1 is there even for none


def _mapped(
    top_ids: np.ndarray, logprobs: np.ndarray, table: np.ndarray, stop_ids: frozenset[int], student_eos: int
) -> tuple[np.ndarray, np.ndarray]:
    """The entries as student ids. A model can have more rows than its tokenizer has ids: those map to nothing."""
    known = (top_ids >= 0) & (top_ids < len(table))
    ids = np.where(known, table[np.where(known, top_ids, 0)], -1)
    ids[np.isin(top_ids, list(stop_ids))] = student_eos
    ids[~np.isfinite(logprobs)] = -1
    return ids, np.where(ids >= 0, logprobs, -np.inf)


def _merged(ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries of one row with the same id as one entry, where the first of them was."""
    ordered = np.sort(ids, axis=1)
    rows = np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1))
    if len(rows):
        some, k = ids[rows], ids.shape[1]
        same = some[:, :, None] == some[:, None, :]  # [rows, k, k]: few rows have twins at all
        total = np.logaddexp.reduce(np.where(same, logprobs[rows][:, None, :], -np.inf), axis=2)
        keep = (some >= 0) & (same.argmax(axis=2) == np.arange(k))
        ids[rows], logprobs[rows] = np.where(keep, some, -1), np.where(keep, total, -np.inf)
    return ids, logprobs


def _scatter(student_ids: np.ndarray, at: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> Targets:
    shape = (len(student_ids), ids.shape[1])
    top_ids, top_logprobs = np.full(shape, -1, dtype=np.int32), np.full(shape, -np.inf, dtype=np.float32)
    strict = np.zeros(len(student_ids), dtype=bool)
    top_ids[at], top_logprobs[at], strict[at] = ids, logprobs, True
    return Targets(student_ids, top_ids, top_logprobs, strict)
