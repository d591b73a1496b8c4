"""Which position is scored against which row, and in which order samples come."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from crosslora.teacher.corpus import Sample
from crosslora.text.alignment import Targets
from crosslora.text.pair import TokenizerPair
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary, shared_tokens
from crosslora.training.batches import (
    HELD_OUT_BATCH,
    Example,
    batch_indices,
    build_examples,
    collate,
    held_out_batches,
    micro_batches,
)
from tests.teacher.test_corpus import sample
from tests.text.test_vocabulary import byte_level_without
from tests.tiny import byte_level_tokenizer


def example(prompt: list[int], response: list[int]) -> Example:
    n = len(response)
    targets = Targets(
        np.array(response, dtype=np.int32),
        np.full((n, 2), -1, dtype=np.int32),
        np.full((n, 2), -np.inf, dtype=np.float32),
        np.zeros(n, dtype=bool),
    )
    return Example(prompt, targets)


def test_each_row_is_scored_at_the_position_before_its_token() -> None:
    batch = collate([example([1, 2, 3], [4, 5, 9]), example([6], [7, 9])])
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    before = batch.ids.flatten()[batch.positions]
    assert before.tolist() == [3, 4, 5, 6, 7]
    assert batch.rows.student_ids.tolist() == [4, 5, 9, 7, 9]


def test_moving_a_batch_keeps_it() -> None:
    batch = collate([example([1], [2, 9])])
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.ids, batch.ids) and torch.equal(moved.positions, batch.positions)
    assert all(torch.equal(new, vars(batch.rows)[name]) for name, new in vars(moved.rows).items())


EXAMPLES = [example([1] * (1 + n * 7 % 12), [2, 9]) for n in range(12)]


def test_every_epoch_holds_every_example_once_and_is_repeatable() -> None:
    taken = [i for batch in islice(batch_indices(EXAMPLES, 4, random_seed=3), 6) for i in batch]
    assert sorted(taken[:12]) == sorted(taken[12:]) == list(range(12))
    assert taken[:12] != taken[12:]
    assert taken == [i for batch in islice(batch_indices(EXAMPLES, 4, random_seed=3), 6) for i in batch]


def test_what_an_epoch_leaves_over_comes_first_in_the_next() -> None:
    taken = [i for batch in islice(batch_indices(EXAMPLES[:10], 4, 0), 5) for i in batch]
    assert sorted(taken) == sorted([*range(10), *range(10)])


def test_more_per_batch_than_there_are_examples() -> None:
    assert sorted(next(batch_indices(EXAMPLES[:2], 4, 0))) == [0, 0, 1, 1]


def test_batches_hold_examples_of_like_length() -> None:
    for batch in islice(batch_indices(EXAMPLES, 4, 0), 3):
        lengths = sorted(EXAMPLES[i].length for i in batch)
        assert lengths[-1] - lengths[0] == 3, "the 12 lengths, sorted, in three parts"


def test_a_resumed_order_goes_on_where_it_stood() -> None:
    whole = list(islice(batch_indices(EXAMPLES[:10], 4, 0), 9))
    assert list(islice(batch_indices(EXAMPLES[:10], 4, 0), 5, 9)) == whole[5:]


def test_micro_batches_hold_every_example_once_and_sort_by_length() -> None:
    examples = [example([1] * n, [2, 9]) for n in (5, 1, 4, 2)]
    parts = micro_batches(examples, 2)
    assert [[len(e.prompt_ids) for e in part] for part in parts] == [[1, 2], [4, 5]]


@pytest.mark.parametrize("number", [1, HELD_OUT_BATCH, 5 * HELD_OUT_BATCH - 1])
@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_held_out_samples_are_shared_out_once_in_equally_many_batches(number: int, world: int) -> None:
    examples = [example([1] * (1 + n % 9), [2, n]) for n in range(number)]
    shares = [list(held_out_batches(examples, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert all(batch for share in shares for batch, _ in share), "every rank has something to compute"
    counted = [
        e.targets.student_ids[1] for share in shares for batch, counts in share if counts for e in batch
    ]
    assert sorted(counted) == list(range(number))


def test_what_the_student_cannot_write_or_is_too_long_is_left_out() -> None:
    teacher, student = byte_level_tokenizer(), byte_level_without("\x04")
    student.add_special_tokens({"eos_token": "</s>"})
    words = Vocabulary(teacher), Vocabulary(student)
    pair = TokenizerPair(ChatFormat(teacher), ChatFormat(student), *words, shared_tokens(*words))
    samples = [said(text, words[0], pair.teacher.eos_id) for text in ("good", "b\x04d", "long " * 40)]
    (kept,) = build_examples(samples, pair, max_tokens=100)
    assert pair.student_words.text(kept.targets.student_ids[:-1].tolist()) == "good"


def said(text: str, words: Vocabulary, eos: int) -> Sample:
    ids = np.array([*words.encode(text), eos], dtype=np.int32)
    logprobs = np.zeros((len(ids), 1), dtype=np.float32)
    return replace(sample("0"), response=text, response_ids=ids, top_ids=ids[:, None], top_logprobs=logprobs)
