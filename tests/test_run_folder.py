"""One writer, stages keyed by their inputs, nothing lost."""

import errno
import json
import os
import re
import socket
from pathlib import Path

import pytest
from pyarrow import fs as arrow_fs

from crosslora.errors import UserError
from crosslora.run_folder import PASSWORD, RunFolder, below, differences, stage_states


def opened(path: Path) -> RunFolder:
    path.mkdir(exist_ok=True)
    return RunFolder.open(str(path))


def test_a_stage_is_done_only_with_its_manifest(tmp_path: Path) -> None:
    stage = opened(tmp_path).stage("fit/a", {"steps": 1})
    assert not stage.done
    stage.finish({"loss": 0.5})
    again = opened(tmp_path).stage("fit/a", {"steps": 1})
    assert again.done and again.manifest()["loss"] == 0.5


def test_other_inputs_are_refused_with_the_difference(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.stage("fit/a", {"fit": {"steps": 1, "rate": 2}})
    folder.write_bytes("fit/a/train/state.bin", b"half a fit")
    with pytest.raises(UserError, match=r"fit\.steps: 1 -> 3\).*--redo fit/a"):
        folder.stage("fit/a", {"fit": {"steps": 3, "rate": 2}})


def test_a_stage_that_made_nothing_takes_other_inputs(tmp_path: Path) -> None:
    """What it was refused for can be mended without --redo."""
    opened(tmp_path).stage("filter/a", {"min_kept": 9}).event("start")
    opened(tmp_path).stage("filter/a", {"min_kept": 3}).finish({})
    assert opened(tmp_path).read_json("filter/a/inputs.json") == {"min_kept": 3}


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(tmp_path)
    folder.write_bytes("a/b.json", b"former")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_bytes("a/b.json", b"later")
    assert folder.read_bytes("a/b.json") == b"former"


def test_differences_name_the_leaves() -> None:
    assert differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 2}, "c": [1]}) == ["a.b: 1 -> 2"]


def test_the_lock_keeps_a_second_writer_out_and_is_freed(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with (
        folder.writing(),
        pytest.raises(UserError, match=f"in use by process {os.getpid()}"),
        folder.writing(),
    ):
        pass
    with folder.writing():
        pass


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    stale = {"host": socket.gethostname(), "pid": 2**22 + 1, "started": "1"}
    (tmp_path / "lock.json").write_text(json.dumps(stale))
    with folder.writing():
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="not writable"), RunFolder.open(str(tmp_path / "run")).writing():
        pass


def test_damaged_json_is_named(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.write_bytes("fit/a/manifest.json", b'{"a": ')
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        folder.read_json("fit/a/manifest.json")


def test_unknown_filesystems_are_refused() -> None:
    with pytest.raises(UserError, match="nonsense://x"):
        RunFolder.open("nonsense://x")


@pytest.mark.parametrize("secret", ["secret", "s3cr/et", ""])
def test_credentials_in_a_uri_are_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(UserError) as refused:
        RunFolder.open(f"s3://key:{secret}@bucket/run")
    assert re.match(
        r"run: s3://\.\.\.@bucket/run holds credentials.*leave them out.*AWS_SECRET_ACCESS_KEY",
        str(refused.value),
    )
    assert "key:" not in str(refused.value)


@pytest.mark.parametrize(
    "uri", ["abfs://container@account.dfs.core.windows.net/run", "hdfs://host:8020/a@b", "s3://bucket/a:b"]
)
def test_containers_and_ports_are_no_credentials(uri: str) -> None:
    assert not PASSWORD.search(uri)


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    stage = opened(tmp_path).stage("fit/a", {})
    stage.event("step", step=1)
    stage.event("step", step=2)
    lines = [json.loads(line) for line in (tmp_path / "fit/a/events.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["stage"] == "fit/a"


def test_status_knows_done_started_and_not_started(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.write_json("run.json", {"config": {"adapters": [{"name": "a"}]}})
    folder.stage("synthesize/a", {}).finish({})
    folder.stage("fit/a", {})
    states = stage_states(folder)
    assert (states["synthesize/a"], states["fit/a"], states["export/a"]) == ("done", "started", "not started")


def test_status_of_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json"):
        stage_states(opened(tmp_path))


def test_a_copy_holds_the_files_and_nothing_below(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path / "run"))
    folder.write_bytes("a/one.bin", b"\x00\xff")
    folder.write_bytes("a/below/two.bin", b"2")
    copied = folder.sub("a").copy(tmp_path / "x/copy")
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == {"one.bin": b"\x00\xff"}
    assert list(folder.sub("none").copy(tmp_path / "empty").iterdir()) == []


def test_a_lock_that_was_deleted_or_replaced_by_hand_ends_no_run(tmp_path: Path) -> None:
    folder, lock = opened(tmp_path), tmp_path / "lock.json"
    with folder.writing():
        lock.unlink()
    with folder.writing():
        lock.write_text('{"host": "another", "pid": 1, "started": "1"}')
    assert lock.exists(), "it is another's"


@pytest.mark.parametrize(
    ("place", "inner"),
    [
        ("runs/mine/", "runs/mine/export/a"),
        ("runs/why?", "runs/why?/export/a"),
        ("s3://bucket/mine", "s3://bucket/mine/export/a"),
        ("s3://bucket/mine/?region=x&scheme=http", "s3://bucket/mine/export/a?region=x&scheme=http"),
    ],
)
def test_the_query_of_a_uri_stays_at_its_end(place: str, inner: str) -> None:
    assert below(place, "export/a") == inner


def test_a_store_without_a_local_folder_keeps_a_second_writer_out_too(tmp_path: Path) -> None:
    inside = arrow_fs.SubTreeFileSystem(str(tmp_path), arrow_fs.LocalFileSystem())
    store = RunFolder("s3://bucket/run", inside, "run")
    assert store.local_root is None
    with store.writing(), pytest.raises(UserError, match="in use by process"), store.writing():
        pass
    store.stage("fit/a", {}).event("step")
    assert len(store.sub("fit/a/events").entries()) == 1, "a file per event: it cannot append"
