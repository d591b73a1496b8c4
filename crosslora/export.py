"""Export: the fitted factors as an ordinary PEFT folder, with the tokenizer and template it was fitted with."""

from __future__ import annotations

import copy
import hashlib
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load as load_tensors
from transformers import PreTrainedTokenizerBase

from crosslora import __version__
from crosslora.adapter import Adapter, read_adapter, write_adapter
from crosslora.config import Base, Config
from crosslora.errors import UserError
from crosslora.identity import base_identity
from crosslora.models import caps_scores, load_model, load_model_config, resolve
from crosslora.projection.build import projection_from
from crosslora.projection.mapping import check_shape
from crosslora.run_folder import RunFolder, Stage
from crosslora.text.pair import TokenizerPair
from crosslora.text.templates import ChatFormat
from crosslora.topology import discover
from crosslora.training.checkpoint import LEARNED, START

PROBE = "The quick brown fox jumps over the lazy dog."
CARD = """---
base_model: {base}
library_name: peft
tags: [lora, crosslora]
---

# {name}, moved to {base_name}

A LoRA adapter for `{base}`, made by crosslora {version} from the adapter `{adapter}` of `{source}`.
It was fitted on what the source model answered ({samples} samples, {held_out:.0%} of them only to check the fit){rehearsal};
no reference answers were used.

| | |
|---|---|
| held-out loss (KL and cross-entropy, nats per token) | {loss:.4f} at step {step} |
| source adapter digest | `{adapter_digest}` |
| target base digest | `{base_digest}` |
| command | `{command}` |

In its answers, and in prompts that it wrote, the source model may have repeated training data that it has memorised.
The licence of the target base applies to this adapter as well.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({where}), "FOLDER")
chat = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], tokenize=False, add_generation_prompt=True)
ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=96, eos_token_id=tokenizer.eos_token_id)[0]))
```
"""


def export(
    config: Config, adapter: Adapter, fitted: Stage, stage: Stage, filtered: dict[str, Any]
) -> dict[str, Any]:
    """Write the PEFT folder, reopen and check it; returns the manifest."""
    pair = TokenizerPair.load(config.source, config.target)
    start, learned = _tensors(fitted, START), _tensors(fitted, LEARNED)
    residual = config.fit.residual
    projection = projection_from(start, adapter, config.source, config.target, residual=residual)
    projection.load_state_dict(start | _own_names(learned))
    identity = base_identity(config.target)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(folder, projection.lora_factors(), config.target.base, config.target.revision)
        check_fits_base(folder, resolve(config.target))
        check_acts(folder, resolve(config.target), pair.student.prompt_ids(PROBE))
        exported_tokenizer(pair.student).save_pretrained(folder)
        (folder / "README.md").write_text(_card(config, adapter, fitted.manifest(), identity, filtered))
        copy_into_run(folder, stage.folder, stage.name)
        files = sorted(path.name for path in folder.iterdir())
    return stage.finish({"files": files, "adapter": read_adapter_digest(stage)})


def _tensors(fitted: Stage, file: str) -> dict[str, torch.Tensor]:
    try:
        return load_tensors(fitted.folder.read_bytes(f"{fitted.name}/{file}"))
    except FileNotFoundError as error:
        raise UserError(f"{fitted.folder.path(fitted.name)}/{file}: is missing; add --redo fit") from error


def exported_tokenizer(chat: ChatFormat) -> PreTrainedTokenizerBase:
    """The tokenizer with the end that the student learned as its EOS: what reads the folder stops there.

    A base's own EOS is often another one than what its chat template writes after an answer.
    """
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(chat.eos_id)
    return tokenizer


def check_fits_base(folder: Path, base_folder: str) -> None:
    """Raise UserError where a factor does not have the shape of the base's linear."""
    linears = discover(load_model_config(base_folder)).by_path()
    for path, factor in read_adapter(folder).factors.items():
        if path not in linears:
            raise UserError(
                f"adapter: {path} is no linear of {base_folder}; give the base that it was made for"
            )
        check_shape(path, linears[path], (factor.B.shape[0], factor.A.shape[1]))


def check_acts(folder: Path, base_folder: str, probe_ids: list[int]) -> None:
    """Load the adapter with PEFT; raise UserError where the logits stay those of the base."""
    base = load_model(base_folder, "auto")
    ids = torch.tensor([probe_ids])
    with torch.inference_mode():
        without = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder)(ids).logits
    if torch.equal(without, adapted):
        raise UserError(
            f"export: with the adapter {base_folder} gives the same logits as without it; fit more steps, or with a "
            "higher fit.learning_rate"
        )


def copy_into_run(folder: Path, run: RunFolder, name: str) -> None:
    for path in sorted(folder.iterdir()):
        run.write_bytes(f"{name}/{path.name}", path.read_bytes())


def read_adapter_digest(stage: Stage) -> str:
    return hashlib.sha256(stage.folder.read_bytes(f"{stage.name}/adapter_model.safetensors")).hexdigest()


def _own_names(learned: dict[str, Any]) -> dict[str, Any]:
    """The student calls the projection `projection.`; here it stands alone."""
    return {name.removeprefix("projection."): tensor for name, tensor in learned.items()}


def _where(base: Base, capped: bool) -> str:
    """The base as arguments of from_pretrained, which takes a GGUF file by its folder and its name."""
    file, arguments = Path(base.base), f'"{base.base}"'
    if file.suffix == ".gguf":
        arguments = f'"{file.parent}", gguf_file="{file.name}"'
    elif base.revision:
        arguments += f', revision="{base.revision}"'
    return arguments + (', attn_implementation="eager"' if capped else "")


def _card(
    config: Config,
    adapter: Adapter,
    fitted: dict[str, Any],
    identity: dict[str, Any],
    filtered: dict[str, Any],
) -> str:
    return CARD.format(
        base=config.target.base,
        where=_where(config.target, caps_scores(load_model_config(resolve(config.target)))),
        base_name=Path(config.target.base).name,
        name=adapter.name,
        version=__version__,
        adapter=adapter.path.name,
        source=config.source.base,
        samples=filtered["counts"]["kept"],
        held_out=config.synthesis.held_out,
        rehearsal=" and on text that the target base wrote" if config.fit.rehearsal else "",
        loss=fitted["held_out_loss"],
        step=fitted["best_step"],
        adapter_digest=adapter.digest[:16],
        base_digest=identity["base_digest"][:16],
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
