"""The two tokenizers of a transfer and what they share; built once, used by plan, projection and fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from crosslora.config import Base
from crosslora.models import load_format, resolve
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary, shared_tokens


@dataclass(frozen=True, eq=False)
class TokenizerPair:
    teacher: ChatFormat
    student: ChatFormat
    teacher_words: Vocabulary
    student_words: Vocabulary
    table: np.ndarray
    """int32 [teacher vocabulary]: the student's id with the same bytes, or -1."""

    @classmethod
    @cache
    def load(cls, source: Base, target: Base) -> TokenizerPair:
        """Raises UserError where a tokenizer is missing or loses text."""
        teacher, student = (load_format(resolve(base, weights=False), base) for base in (source, target))
        teacher_words, student_words = Vocabulary(teacher.tokenizer), Vocabulary(student.tokenizer)
        table = shared_tokens(teacher_words, student_words)
        return cls(teacher, student, teacher_words, student_words, table)

    @property
    def shared(self) -> np.ndarray:
        """int64 [n, 2] pairs (teacher id, student id), low ids first: tokenizers number frequent tokens first."""
        ids = np.flatnonzero(self.table >= 0)
        return np.stack([ids, self.table[ids]], axis=1).astype(np.int64)
