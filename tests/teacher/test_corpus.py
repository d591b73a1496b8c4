"""Shards come back as they were written, and damage is seen."""

from pathlib import Path

import numpy as np
import pytest

from crosslora.errors import UserError
from crosslora.run_folder import RunFolder
from crosslora.teacher.corpus import (
    Sample,
    read_corpus,
    read_shard,
    shard_exists,
    write_shard,
    write_verdicts,
)


def sample(sample_id: str, n: int = 3, **changes: object) -> Sample:
    values = {
        "sample_id": sample_id,
        "strategy": "self",
        "prompt": f"prompt {sample_id}",
        "response": "answer é",
        "finished": True,
        "response_ids": np.arange(n, dtype=np.int32),
        "top_ids": np.arange(2 * n, dtype=np.int32).reshape(n, 2),
        "top_logprobs": np.full((n, 2), -np.inf, dtype=np.float32),
        "logprobs_on": np.full(n, -0.5, dtype=np.float32),
        "logprobs_off": np.full(n, -2.5, dtype=np.float32),
    }
    return Sample(**{**values, **changes})  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path))
    written = [sample("0"), sample("1", 5), sample("2", 0), sample("3", response=None)]
    write_shard(folder, "synthesize/a", 0, written, len(written))
    assert shard_exists(folder, "synthesize/a", 0, len(written))
    assert not shard_exists(folder, "synthesize/a", 0, len(written) + 1), "more were asked for"
    for one, two in zip(written, read_shard(folder, "synthesize/a", 0), strict=True):
        assert (one.sample_id, one.response, one.finished) == (two.sample_id, two.response, two.finished)
        np.testing.assert_array_equal(one.response_ids, two.response_ids)
        if len(one.response_ids):
            np.testing.assert_array_equal(one.top_ids, two.top_ids)
            np.testing.assert_array_equal(one.top_logprobs, two.top_logprobs)


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path))
    write_shard(folder, "synthesize/a", 0, [sample("0")], 1)
    file = tmp_path / "synthesize/a/shard-00000.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged"):
        read_shard(folder, "synthesize/a", 0)
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        read_shard(folder, "synthesize/a", 0)


def test_a_shard_without_its_marker_does_not_exist(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path))
    write_shard(folder, "synthesize/a", 0, [sample("0")], 1)
    (tmp_path / "synthesize/a/shard-00000.json").unlink()
    assert not shard_exists(folder, "synthesize/a", 0, 1)


def test_the_corpus_is_what_was_kept(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path))
    write_shard(folder, "synthesize/a", 0, [sample("0"), sample("1"), sample("2")], 3)
    folder.write_json("synthesize/a/manifest.json", {"shards": [0]})
    rows = [
        {"sample_id": "0", "verdict": "kept", "held_out": False},
        {"sample_id": "1", "verdict": "empty", "held_out": False},
        {"sample_id": "2", "verdict": "kept", "held_out": True},
    ]
    write_verdicts(folder, "filter/a", rows)
    train, held_out = read_corpus(folder, "synthesize/a", "filter/a")
    assert [s.sample_id for s in train] == ["0"] and [s.sample_id for s in held_out] == ["2"]


def test_adapter_effect_is_nats_per_token() -> None:
    assert sample("0").adapter_effect == pytest.approx(2.0)
