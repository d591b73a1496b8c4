"""Strict configuration: every mistake is one sentence that names the field."""

from pathlib import Path
from typing import Any

import pytest

from crosslora.config import Config, load_config, parse_config
from crosslora.errors import UserError


def tree(**changes: Any) -> dict[str, Any]:
    base = {
        "run": "run",
        "source": {"base": "org/source"},
        "adapters": [{"name": "a", "path": "adapter"}],
        "target": {"base": "org/target"},
    }
    return {**base, **changes}


def test_relative_paths_resolve_from_the_folder_of_the_file(tmp_path: Path) -> None:
    config = parse_config(tree(), tmp_path)
    assert config.adapters[0].path == tmp_path / "adapter"
    assert config.run == str(tmp_path / "run")
    assert config.source.base == "org/source"


def test_uris_are_left_alone(tmp_path: Path) -> None:
    assert parse_config(tree(run="s3://bucket/run"), tmp_path).run == "s3://bucket/run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": {"stps": 3}}, r"fit\.stps: unknown key; did you mean steps\?"),
        ({"synthesis": {"zzz": 3}}, r"synthesis\.zzz: unknown key; known keys here: prompts"),
        ({"adapters": []}, "adapters"),
        ({"evaluation": {"tasks": [{"name": "held_out", "path": "x"}]}}, "two tasks are named 'held_out'"),
        ({"fit": {"random_seed": -1}}, r"fit\.random_seed"),
        ({"adapters": [{"name": "a/b", "path": "x"}]}, r"adapters\.0\.name"),
        ({"adapters": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "names must differ"),
        ({"fit": {"batch_size": 5, "workers": 2}}, r"fit\.batch_size: 5 does not divide"),
        ({"synthesis": {"prompts": {"self": 0}}}, "weight above 0"),
        ({"synthesis": {"prompts": {"seeds": 1}}}, "seeds_file is missing"),
        ({"synthesis": {"prompts": {"prompts_file": "p.jsonl"}}}, "give file a weight"),
        ({"synthesis": {"tensor_parallel": 2}}, "needs GPUs"),
        ({"evaluation": {"tasks": [{"name": "t", "path": "p", "metrics": ["bleu"]}]}}, "'bleu' is none of"),
        ({"source": {"base": "x", "chat_template": "missing.jinja"}}, "chat_template"),
        ({"evaluation": {"tasks": [{"name": "", "path": "p"}]}}, r"evaluation\.tasks\.0\.name"),
        ({"run": "~nobody-of-this-name/run"}, "configuration: '~nobody-of-this-name/run' is no path"),
        ({"source": {"base": "x" * 300}}, "configuration: 'x{60}' is no path"),
        ({"source": {"base": "x", "chat_template": "a\0b"}}, "chat_template: .* is neither"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(tree(**changes), tmp_path)


def test_a_template_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(UserError, match="is neither Jinja text nor a readable file"):
        parse_config(tree(source={"base": "x", "chat_template": "chat.jinja"}), tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    incomplete = tree()
    del incomplete["target"]
    with pytest.raises(UserError, match="target: is missing"):
        parse_config(incomplete, tmp_path)


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run: r\nsource: {base: a/b}\nadapters: [{name: a, path: p}]\ntarget: {base: c/d}\n")
    config = load_config(file, ["fit.steps=7", "adapters.0.name=other", "synthesis.prompts.self=2.5"])
    assert (config.fit.steps, config.adapters[0].name, config.synthesis.prompts.self) == (7, "other", 2.5)


@pytest.mark.parametrize(
    "override", ["fit.steps", "=3", "fit.steps=[", "run.a=1", "adapters.3.name=q", "adapters.x=q"]
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run: r\nsource: {base: a/b}\nadapters: [{name: a, path: p}]\ntarget: {base: c/d}\n")
    with pytest.raises(UserError):
        load_config(file, [override])


@pytest.mark.parametrize("content", ["- a\n", "a: [", ""])
def test_files_that_hold_no_mapping(tmp_path: Path, content: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(file)


def test_a_dumped_configuration_reads_back(tmp_path: Path) -> None:
    config = parse_config(tree(), tmp_path)
    assert Config.model_validate(config.model_dump(mode="json")) == config
