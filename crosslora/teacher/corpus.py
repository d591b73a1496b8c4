"""The corpus on disk: Parquet shards of raw samples, and one table that says which were kept, and why not."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crosslora.errors import UserError
from crosslora.run_folder import RunFolder

SCHEMA_VERSION = 1
FILE = "file"
"""Strategy of prompts that the user gave."""
SHARD = pa.schema(
    [
        ("sample_id", pa.string()),
        ("strategy", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),  # null where the bytes are not valid UTF-8
        ("finished", pa.bool_()),
        ("response_ids", pa.list_(pa.int32())),  # as generated, the stop id included
        ("top_ids", pa.list_(pa.int32())),  # n * k, flattened
        ("top_logprobs", pa.list_(pa.float32())),
        ("logprobs_on", pa.list_(pa.float32())),  # of the response ids under the teacher
        ("logprobs_off", pa.list_(pa.float32())),  # under the source base alone
    ]
)
VERDICTS = pa.schema([("sample_id", pa.string()), ("verdict", pa.string()), ("held_out", pa.bool_())])


@dataclass
class Sample:
    """One synthetic conversation with the teacher's distribution over its response."""

    sample_id: str
    strategy: str
    prompt: str
    response: str | None
    finished: bool
    response_ids: np.ndarray  # int32 [n]
    top_ids: np.ndarray  # int32 [n, k], -1 where the teacher gave fewer
    top_logprobs: np.ndarray  # float32 [n, k]
    logprobs_on: np.ndarray  # float32 [n]
    logprobs_off: np.ndarray  # float32 [n]

    @property
    def adapter_effect(self) -> float:
        """Mean over the response of log p_on - log p_off, in nats per token."""
        return float(np.mean(self.logprobs_on - self.logprobs_off)) if len(self.logprobs_on) else 0.0


def write_shard(folder: RunFolder, stage: str, index: int, samples: list[Sample], asked: int) -> None:
    """Write shard and then its marker, which holds how many samples were `asked` for, and the digest that reading checks."""
    columns = [[_plain(getattr(sample, field.name)) for sample in samples] for field in SHARD]
    table = pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, SHARD, strict=True)], schema=SHARD
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    folder.write_bytes(f"{stage}/shard-{index:05d}.parquet", content)
    marker = {"asked": asked, "rows": len(samples), "sha256": hashlib.sha256(content).hexdigest()}
    folder.write_json(f"{stage}/shard-{index:05d}.json", marker)


def shard_exists(folder: RunFolder, stage: str, index: int, asked: int) -> bool:
    """Not one of another size: the last one of fewer samples is written again where there are to be more."""
    marker = f"{stage}/shard-{index:05d}.json"
    return folder.exists(marker) and folder.read_json(marker)["asked"] == asked


def read_shard(folder: RunFolder, stage: str, index: int) -> list[Sample]:
    """Raises UserError where the shard is damaged."""
    name = f"{stage}/shard-{index:05d}"
    try:
        content, marker = folder.read_bytes(f"{name}.parquet"), folder.read_json(f"{name}.json")
    except FileNotFoundError as error:
        raise UserError(f"{folder.path(name)}: is missing; add --redo {stage}") from error
    if hashlib.sha256(content).hexdigest() != marker["sha256"]:
        raise UserError(
            f"{folder.path(name)}.parquet: damaged (its digest does not match); add --redo {stage} to write the corpus again"
        )
    return [_sample(row) for row in pq.read_table(pa.BufferReader(content)).to_pylist()]


def write_verdicts(folder: RunFolder, stage: str, verdicts: list[dict[str, Any]]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(verdicts, schema=VERDICTS), sink)
    folder.write_bytes(f"{stage}/verdicts.parquet", sink.getvalue().to_pybytes())


def read_samples(folder: RunFolder, shards_stage: str) -> list[Sample]:
    """Every raw sample of a finished synthesis, in order of the ids."""
    shards = folder.read_json(f"{shards_stage}/manifest.json")["shards"]
    return [sample for index in shards for sample in read_shard(folder, shards_stage, index)]


def read_corpus(folder: RunFolder, shards_stage: str, filter_stage: str) -> tuple[list[Sample], list[Sample]]:
    """(samples to train on, held-out samples), both kept by every filter, in order of their ids."""
    verdicts = pq.read_table(
        pa.BufferReader(folder.read_bytes(f"{filter_stage}/verdicts.parquet"))
    ).to_pylist()
    kept = {row["sample_id"]: row["held_out"] for row in verdicts if row["verdict"] == "kept"}
    samples = [sample for sample in read_samples(folder, shards_stage) if sample.sample_id in kept]
    return [s for s in samples if not kept[s.sample_id]], [s for s in samples if kept[s.sample_id]]


def _plain(value: Any) -> Any:
    return value.ravel() if isinstance(value, np.ndarray) else value


def _sample(row: dict[str, Any]) -> Sample:
    n = len(row["response_ids"])
    return Sample(
        **{name: row[name] for name in ("sample_id", "strategy", "prompt", "response", "finished")},
        response_ids=np.array(row["response_ids"], dtype=np.int32),
        top_ids=np.array(row["top_ids"], dtype=np.int32).reshape(n, -1 if n else 0),
        top_logprobs=np.array(row["top_logprobs"], dtype=np.float32).reshape(n, -1 if n else 0),
        logprobs_on=np.array(row["logprobs_on"], dtype=np.float32),
        logprobs_off=np.array(row["logprobs_off"], dtype=np.float32),
    )
