"""What `crosslora serve` finds in the places it is given, and what it refuses before anything starts."""

import json
import shutil
from pathlib import Path

import pytest

from crosslora.adapter_places import Found, Places, common_base, keep_source
from crosslora.adapter_watch import Rules, Watch
from crosslora.config import AdapterSource, Base
from crosslora.errors import UserError
from crosslora.run_folder import RunFolder
from crosslora.vllm_settings import lora_options
from tests.tiny import tiny_llama, tiny_lora


def find_adapters(places: list[str], into: Path) -> list[Found]:
    return Places(tuple(places)).find(into)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    tiny_llama(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    """A run folder that has exported one of its two adapters."""
    run = tmp_path / "run"
    tiny_lora(run / "export/first", base, 1)
    (run / "export/first/manifest.json").write_text("{}")
    config = {
        "run": str(run),
        "source": {"base": "source"},
        "adapters": [{"name": name, "path": str(tmp_path / name)} for name in ("first", "second")],
        "target": {"base": str(base)},
    }
    (run / "run.json").write_text(json.dumps({"config": config}))
    return run


def test_adapters_of_runs_and_folders_by_path_and_uri(run: Path, base: Path, tmp_path: Path) -> None:
    tiny_lora(run / "export/second", base, 2)
    (run / "export/second/manifest.json").write_text("{}")
    alone = tmp_path / "alone"
    tiny_lora(alone, base, 3)
    tiny_lora(tmp_path / "many/a", base, 4)
    tiny_lora(tmp_path / "many/b", base, 5)
    found = find_adapters([f"file://{run}", f"{alone}/", f"{tmp_path}/many"], tmp_path / "copies")
    assert [adapter.name for adapter in found] == ["first", "second", "alone", "a", "b"]
    origins = [run / "export/first", run / "export/second", alone, tmp_path / "many/a", tmp_path / "many/b"]
    for adapter, origin in zip(found, origins, strict=True):
        weights = "adapter_model.safetensors"
        assert (adapter.folder / weights).read_bytes() == (origin / weights).read_bytes()


def test_a_run_keeps_its_source_adapters(run: Path, base: Path, tmp_path: Path) -> None:
    """Served as teachers, they are read from the run."""
    teachers = Places((f"file://{run}",), teachers=True)
    (run / "export/second").mkdir()  # not finished: it has no teacher yet
    with pytest.raises(UserError, match=r"source/first: holds no adapter_model\.safetensors; copy"):
        teachers.find(tmp_path / "none")
    for number, name in enumerate(("first", "second")):
        tiny_lora(tmp_path / name, base, number, r=4)
        keep_source(RunFolder.open(str(run)), AdapterSource(name=name, path=tmp_path / name))
        weights = "adapter_model.safetensors"
        assert (run / "source" / name / weights).read_bytes() == (tmp_path / name / weights).read_bytes()
    found = teachers.find(tmp_path / "copies")
    assert [adapter.name for adapter in found] == ["first-teacher"]
    kept = run / "source/first/adapter_model.safetensors"
    written = kept.stat().st_mtime_ns
    keep_source(RunFolder.open(str(run)), AdapterSource(name="first", path=tmp_path / "first"))
    assert kept.stat().st_mtime_ns == written


def test_an_adapter_without_a_base_asks_for_one(base: Path, tmp_path: Path) -> None:
    tiny_lora(tmp_path / "mine", base, 1)
    header = tmp_path / "mine/adapter_config.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"mine: its adapter_config\.json names no base; give --base"):
        common_base(find_adapters([str(tmp_path / "mine")], tmp_path / "copies"))


def test_of_a_run_what_is_exported_is_found(run: Path, base: Path, tmp_path: Path) -> None:
    tiny_lora(run / "export/second", base, 2)  # without its manifest: it is still being written
    assert [adapter.name for adapter in find_adapters([str(run)], tmp_path / "copies")] == ["first"]


def test_a_place_without_an_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "export/first/manifest.json").unlink()
    (tmp_path / "empty").mkdir()
    for place in (run, tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(UserError, match=f"{place}: holds no adapter"):
            find_adapters([str(place)], tmp_path / "copies")


def test_two_adapters_of_one_name_are_refused(base: Path, tmp_path: Path) -> None:
    places = [tmp_path / "x/mine", tmp_path / "y/mine"]
    for place in places:
        tiny_lora(place, base, 1)
    with pytest.raises(UserError, match="named 'mine' is there already"):
        find_adapters([str(place) for place in places], tmp_path / "copies")


def test_one_engine_has_one_chat_template_and_one_base(base: Path, tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        tiny_lora(place, base, 1)
    header = json.loads((places[1] / "adapter_config.json").read_text())
    (places[1] / "adapter_config.json").write_text(
        json.dumps({**header, "base_model_name_or_path": "another"})
    )
    names = [str(place) for place in places]
    with pytest.raises(UserError, match="belong to different bases"):
        common_base(find_adapters(names, tmp_path / "copies"))
    (places[1] / "adapter_config.json").write_text(json.dumps({**header, "revision": "abc"}))
    with pytest.raises(UserError, match=rf"belong to different bases \({base}, {base}@abc\)"):
        common_base(find_adapters(names, tmp_path / "copies"))
    (places[1] / "adapter_config.json").write_text(json.dumps({**header, "revision": "main"}))
    assert common_base(find_adapters(names, tmp_path / "copies")) == Base(base=str(base))
    (places[1] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="two was fitted with another tokenizer or chat template"):
        find_adapters(names, tmp_path / "more copies")


def test_what_has_the_name_of_another_is_said_and_the_rest_is_served(base: Path, tmp_path: Path) -> None:
    for place in ("x/mine", "x/other"):
        tiny_lora(tmp_path / place, base, 1)
    lora = lora_options([tmp_path / "x/mine"])
    watch = Watch(Places((str(tmp_path / "x"), str(tmp_path / "y"))), Rules("base", None, None, lora))
    assert sorted(change.name for change in watch.look() if change.files) == ["mine", "other"]
    tiny_lora(tmp_path / "y/mine", base, 1)
    shutil.rmtree(tmp_path / "x/other")
    changes = {change.name: change for change in [*watch.look(), *watch.look()]}
    assert changes.keys() == {"other", str(tmp_path / "y/mine")}
    assert "named 'mine' is there already" in (changes[str(tmp_path / "y/mine")].problem or "")


def test_what_does_not_belong_to_a_server_is_refused(base: Path, tmp_path: Path) -> None:
    folder = tiny_lora(tmp_path / "mine", base, 1, r=4)
    mine, lora = Found("mine", folder), lora_options([folder])
    Rules("base", Base(base=str(base)), None, lora).check(mine)
    for rules, reason in (
        (Rules("base", None, None, lora | {"max_lora_rank": 2}), "does not fit"),
        (Rules("base", None, None, lora | {"lora_target_modules": ["q_proj"]}), "does not fit"),
        (Rules("base", Base(base="x/y"), None, lora), "serve it apart"),
        (Rules("mine", None, None, lora), "the name of the base"),
    ):
        with pytest.raises(UserError, match=reason):
            rules.check(mine)


def test_a_file_is_no_place(run: Path, tmp_path: Path) -> None:
    file = run / "export/first/adapter_model.safetensors"
    with pytest.raises(UserError, match="holds no adapter"):
        find_adapters([str(file)], tmp_path / "found")
