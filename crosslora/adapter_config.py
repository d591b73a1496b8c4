"""What adapter_config.json means: the settings that scale the factors, and those that cannot be moved.

Some settings make the saved tensors mean something else than dW = scaling * B @ A. Each field of PEFT 0.21's
LoraConfig is in exactly one of three tables: used here, refused by name, or without effect on dW.
"""

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslora.errors import UserError

CONFIG_FILE = "adapter_config.json"

# fmt: off
USED_FIELDS = frozenset((
    "peft_type", "task_type", "base_model_name_or_path", "revision", "bias", "init_lora_weights",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
))
# They say which modules were trained (the tensors say it better) or how the training went.
NO_EFFECT_FIELDS = frozenset((
    "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules", "layers_pattern",
    "layers_to_transform", "fan_in_fan_out", "lora_dropout", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
))
# fmt: on
# Field, why its adapters are not a plain low-rank update of linear layers, and what the user can do.
REFUSED_FIELDS = {
    "use_dora": "DoRA also rescales the base; merge it and extract a plain LoRA from the weights' change",
    "lora_bias": "a bias on B is not a low-rank update; train the adapter with lora_bias=False",
    "modules_to_save": "it replaces whole modules of the base; train the adapter without modules_to_save",
    "trainable_token_indices": "it replaces rows of the embeddings; train the adapter without it",
    "target_parameters": "updates of bare parameters (fused experts) cannot be moved; target linear modules",
    "layer_replication": "it changes the depth of the base; train the adapter on a base of fixed depth",
    "alora_invocation_tokens": "Activated LoRA acts on a part of the text only; train a plain LoRA",
    "use_qalora": "QALoRA pools the inputs of A; train a plain LoRA",
    "use_bdlora": "block-diagonal LoRA stores its factors in blocks; train a plain LoRA",
    "kasa_config": "KaSA truncates the base weights; train a plain LoRA",
    "monteclora_config": "MonteCLoRA samples its weights; train a plain LoRA",
    "velora_config": "VeLoRA stores tensors of its own; train a plain LoRA",
    "arrow_config": "Arrow routes between several adapters; give one plain LoRA",
    "megatron_config": "it was trained on Megatron's sharded layers; convert it to plain linear layers",
}
# They only choose the first A and B. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CONVERT_INIT = (
    "this start changes the base weights; save the adapter again with PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraSettings:
    """The checked settings of a plain LoRA; `file` is where they were read, for messages."""

    file: Path
    base_model_name_or_path: str
    revision: str | None
    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def rank(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """The factor on B @ A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
        rank = self.rank(module)
        return _first_match(self.alpha_pattern, module, self.alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )


def read_settings(folder: Path) -> LoraSettings:
    """Read adapter_config.json; UserError where it is missing, broken, or no plain LoRA of a causal model."""
    file = folder / CONFIG_FILE
    config = _load(file)
    _check_kind(file, config)
    _check_refused(file, config)
    _check_numbers(file, config)
    _warn_unknown(file, config)
    return LoraSettings(
        file=file,
        base_model_name_or_path=config.get("base_model_name_or_path") or "",
        revision=None if config.get("revision") in ("", "main") else config.get("revision"),
        r=config["r"],
        alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def _load(file: Path) -> dict[str, Any]:
    if not file.parent.is_dir():
        raise UserError(
            f"{file.parent}: not a folder; give the local folder of a PEFT LoRA (download a hub adapter)"
        )
    if not file.is_file():
        inside = ", ".join(sorted(child.parent.name for child in file.parent.glob(f"*/{CONFIG_FILE}")))
        hint = f"give one of its subfolders: {inside}" if inside else "give the folder of a PEFT adapter"
        raise UserError(f"{file}: no such file; {hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); copy the adapter again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds no JSON object; copy the adapter again")
    return config


def _check_kind(file: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        way_out = "convert other methods with peft.save_as_lora"
        raise _refusal(file, config, "peft_type", f"only LORA can be moved; {way_out}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refusal(
            file, config, "task_type", "only causal language models are moved; give a CAUSAL_LM adapter"
        )
    name = "base_model_name_or_path"
    if not isinstance(config.get(name), str | None):
        raise _refusal(file, config, name, "it is not a name; write a string or null there")


def _check_refused(file: Path, config: dict[str, Any]) -> None:
    for name, reason in REFUSED_FIELDS.items():
        if config.get(name):
            raise _refusal(file, config, name, reason)
    if config.get("bias", "none") != "none":
        raise _refusal(
            file, config, "bias", "trained biases are no low-rank update; train it with bias='none'"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        raise _refusal(file, config, "init_lora_weights", _CONVERT_INIT)


def _check_numbers(file: Path, config: dict[str, Any]) -> None:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    sound = {
        "r": _is_rank(config.get("r")),
        "lora_alpha": _is_finite(config.get("lora_alpha")),
        "use_rslora": isinstance(config.get("use_rslora"), bool | None),
        "rank_pattern": _is_pattern(ranks) and all(map(_is_rank, ranks.values())),
        "alpha_pattern": _is_pattern(alphas) and all(map(_is_finite, alphas.values())),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise _refusal(file, config, name, "PEFT writes no such value; restore the config PEFT saved")


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, dict) and all(re.compile(_whole_path(key)) for key in value)
    except re.error:
        return False


def _first_match(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """As PEFT loads the folder: the first match in the file's order (PEFT sorts keys on saving)."""
    return next((value for key, value in pattern.items() if re.match(_whole_path(key), module)), default)


def _whole_path(key: str) -> str:
    """A key matches a whole module path, or its end after a dot (peft.utils.other.get_pattern_key)."""
    return rf"(.*\.)?({key})$"


def _warn_unknown(file: Path, config: dict[str, Any]) -> None:
    unknown = set(config) - USED_FIELDS - NO_EFFECT_FIELDS - REFUSED_FIELDS.keys()
    if in_use := ", ".join(sorted(name for name in unknown if config[name])):
        _log.warning("%s: ignored unknown fields: %s; check that none changes dW", file, in_use)


def _refusal(file: Path, config: dict[str, Any], name: str, reason: str) -> UserError:
    value = json.dumps(config.get(name))
    return UserError(f"{file}: {name} is {value if len(value) <= 80 else value[:77] + '...'}; {reason}")
