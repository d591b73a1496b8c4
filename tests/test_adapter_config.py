"""One test for each field of PEFT's config that is refused, and for what is only warned of."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from crosslora import adapter_config
from crosslora.adapter_header import read_header
from tests.saved_adapter import CONFIG, Q0, UP1, edit, ranks, refused, saved_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_adapter(tmp_path)


def test_every_field_of_pefts_config_is_in_one_table() -> None:
    tables = [*adapter_config.USED_FIELDS, *adapter_config.NO_EFFECT_FIELDS, *adapter_config.REFUSED_FIELDS]
    assert sorted(tables) == sorted(field.name for field in dataclasses.fields(LoraConfig))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.up"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 2}),
        ("arrow_config", {"top_k": 2}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "something new"),
        ("r", 0),
        ("r", None),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_(proj": 2}),
        ("rank_pattern", [2]),
        ("alpha_pattern", {"q_proj": "16"}),
        ("base_model_name_or_path", 3),
    ],
)
def test_field_is_refused_by_name_and_value(folder: Path, field: str, value: Any) -> None:
    edit(folder, **{field: value})
    assert f"{field} is {json.dumps(value)};" in refused(folder)


def test_every_refused_field_is_tested() -> None:
    (cases,) = test_field_is_refused_by_name_and_value.pytestmark
    assert adapter_config.REFUSED_FIELDS.keys() <= {field for field, _ in cases.args[1]}


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_read(folder: Path, init: Any) -> None:
    edit(folder, init_lora_weights=init)
    assert ranks(folder) == {Q0: 2, UP1: 2}


def test_a_long_value_is_shortened(folder: Path) -> None:
    edit(folder, trainable_token_indices=list(range(1000)))
    assert len(refused(folder)) < len(str(folder)) + 250


def test_unknown_fields_in_use_are_named_in_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_header(folder)
        assert caplog.text == ""
        edit(folder, use_newest=True, gamma=0.5, off=False, absent=None, empty={})
        read_header(folder)
    (record,) = caplog.records
    assert "gamma, use_newest;" in record.getMessage()
    assert "off" not in record.getMessage() and "empty" not in record.getMessage()


def test_alpha_zero_is_refused(folder: Path) -> None:
    edit(folder, lora_alpha=0)
    assert "changes nothing" in refused(folder)


@pytest.mark.parametrize(
    ("content", "words"), [(b"{", "as JSON"), (b"\xff\xfe", "as JSON"), (b"[]", "no JSON object")]
)
def test_a_broken_config_is_refused(folder: Path, content: bytes, words: str) -> None:
    (folder / CONFIG).write_bytes(content)
    assert words in refused(folder)
