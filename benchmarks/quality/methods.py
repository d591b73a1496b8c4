"""What is compared. Each method makes an adapter folder and says what it took."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import crosslora
from benchmarks.alone import alone
from benchmarks.quality import closed
from benchmarks.quality import gold as trl
from benchmarks.quality.answers import plain_prompts
from benchmarks.quality.cells import BATCH, WORK, Cell, write_whole
from benchmarks.quality.distil import PlainLora, distil
from benchmarks.quality.tasks import Row
from benchmarks.train_adapter import DTYPE, Recipe, conversations, mean_loss, save, train
from benchmarks.whole_run import stage_minutes
from crosslora.adapter import LoraFactors, read_adapter, write_adapter
from crosslora.adapter_config import read_settings
from crosslora.config import Base, Config, Prompts
from crosslora.evaluation.baselines import baseline
from crosslora.models import load_format, resolve
from crosslora.projection.build import Transfer, build_transfer
from crosslora.projection.projection import Projection
from crosslora.projection.start import start_of, whole_basis
from crosslora.run_folder import RunFolder
from crosslora.teacher.corpus import read_corpus
from crosslora.text.pair import TokenizerPair

Report = dict[str, Any]
ORACLE_RATES = (5e-4, 1e-3, 2e-3)
ALIGNED = 200
"""Conversations whose activations are aligned."""
LONG_FIT = {"steps": 1500, "batch_size": 4}
"""Of the method of this name."""
VALIDATION = 100
"""Training rows that only choose the oracle's learning rate."""


def make_source_adapter(cell: Cell) -> None:
    """The adapter that is to be moved; rows and recipe are the same whatever the random seed."""
    folder = cell.source_adapter
    if (folder / "adapter_config.json").exists():
        return
    setting = cell.setting
    recipe = Recipe(steps=setting.source_steps, batch_size=BATCH, completions_only=setting.completions_only)
    base, rows = cell.bases[0], cell.rows[0]
    alone(_train_into, base, rows, recipe, folder, "source adapter")


def as_it_is(cell: Cell) -> Report:
    """Target base and teacher are there already."""
    return {}


def oracle(cell: Cell) -> Report:
    """LoRA on the target with the original data: same rank, linears and number of steps as the student."""
    base, rows = cell.bases[1], cell.rows[0]
    rate, tried = _oracle_rate(cell)
    recipe = Recipe(
        rank=read_settings(cell.source_adapter).r,
        steps=cell.setting.steps,
        batch_size=BATCH,
        learning_rate=rate,
        completions_only=True,
        random_seed=cell.random_seed,
    )
    if cell.random_seed == 0:
        return tried  # made while its learning rate was chosen
    return tried | alone(_train_into, base, rows[VALIDATION:], recipe, cell.folder, "oracle")


def _oracle_rate(cell: Cell) -> tuple[float, Report]:
    """Best of three by the validation loss with random seed 0; other random seeds take it over."""
    folder = cell.folder.parent / f"oracle-rates-{cell.setting.steps}"
    for rate in ORACLE_RATES:
        if not (folder / f"{rate}.json").exists():
            rank = read_settings(cell.source_adapter).r
            recipe = Recipe(rank, cell.setting.steps, BATCH, rate, completions_only=True)
            rows = cell.rows[0]
            alone(_train_into, cell.bases[1], rows[VALIDATION:], recipe, folder / str(rate), f"oracle {rate}")
            loss = alone(_validation_loss, cell.bases[1], folder / str(rate), rows[:VALIDATION])
            (folder / f"{rate}.json").write_text(json.dumps({"loss": loss}))
    losses = {rate: json.loads((folder / f"{rate}.json").read_text())["loss"] for rate in ORACLE_RATES}
    best = min(losses, key=lambda rate: losses[rate])
    if cell.random_seed == 0:
        shutil.copytree(folder / str(best), cell.folder, dirs_exist_ok=True)
    return best, {"learning_rate": best, "validation_losses": losses}


def _validation_loss(base: Base, folder: Path, rows: list[Row]) -> float:
    from peft import PeftModel

    from crosslora.models import load_model

    model = PeftModel.from_pretrained(load_model(resolve(base), DTYPE), folder).eval()
    return mean_loss(model, conversations(rows, load_format(resolve(base), base)))


def _train_into(base: Base, rows: list[Row], recipe: Recipe, folder: Path, title: str) -> Report:
    started = time.monotonic()
    save(train(base, rows, recipe, title), base.base, folder)
    return {"minutes": (time.monotonic() - started) / 60}


def default(cell: Cell) -> Report:
    """The product: crosslora.transfer, up to the exported adapter."""
    return _transferred(cell, cell.config())


def five_seeds(cell: Cell) -> Report:
    """The product with five seed examples: prompts of training rows."""
    examples = WORK / "data" / f"{cell.task}-five.jsonl"
    _write_prompts(examples, [row["prompt"] for row in cell.rows[0][:5]])
    prompts = Prompts(self=0, seeds=1, seeds_file=examples)
    return _transferred(cell, _with_prompts(cell.config(), "five-seeds", prompts))


def generic(cell: Cell) -> Report:
    """The product with prompts of no domain, which the source base alone writes: what any fine-tuning on the teacher's
    answers would bring."""
    config = cell.config()
    count = 2 * config.synthesis.samples
    file = WORK / "data" / f"{cell.direction}-generic-{count}-{cell.random_seed}.jsonl"
    if not file.exists():
        written = alone(plain_prompts, cell.bases[0], count, cell.random_seed)
        _write_prompts(file, written)
    return _transferred(cell, _with_prompts(config, "generic", Prompts(self=0, file=1, prompts_file=file)))


def real_prompts(cell: Cell) -> Report:
    """The product with the prompts of the training rows: what is lost for want of them."""
    config = cell.config()
    file = WORK / "data" / f"{cell.task}-training.jsonl"
    _write_prompts(file, [row["prompt"] for row in cell.rows[0][: config.synthesis.samples]])
    return _transferred(cell, _with_prompts(config, "real", Prompts(self=0, file=1, prompts_file=file)))


def _write_prompts(file: Path, prompts: Sequence[str]) -> None:
    write_whole(file, "".join(json.dumps({"prompt": text}) + "\n" for text in prompts))


def _with_prompts(config: Config, name: str, prompts: Prompts) -> Config:
    synthesis = config.synthesis.model_copy(update={"prompts": prompts})
    return config.model_copy(update={"run": f"{config.run}-{name}", "synthesis": synthesis})


def _transferred(cell: Cell, config: Config) -> Report:
    name = cell.task
    crosslora.transfer(config, until="export")
    run = RunFolder.open(config.run)
    shutil.rmtree(cell.folder, ignore_errors=True)  # of a cell that was stopped while it was scored
    run.sub(f"export/{name}").copy(cell.folder)
    fitted, filtered = (run.read_json(f"{stage}/{name}/manifest.json") for stage in ("fit", "filter"))
    return {
        "minutes": {
            stage: stage_minutes(run, f"{stage}/{name}") for stage in ("synthesize", "filter", "fit")
        },
        "steps": config.fit.steps,
        "batch_size": config.fit.batch_size,
        "samples": filtered["counts"],
        "coverage": fitted["coverage"],
        "held_out_kl": fitted["held_out_kl"],
        "tokens_per_second": fitted["tokens_per_second"],
        "verbatim": _verbatim(cell, run),
    }


def _verbatim(cell: Cell, run: RunFolder) -> Report:
    """How many of the corpus's prompts stand in the task's own rows, word for word."""
    train, held_out = read_corpus(run, *corpus_stages(cell))
    prompts = {sample.prompt.strip() for sample in [*train, *held_out]}
    training, test = ({row["prompt"].strip() for row in rows} for rows in cell.rows)
    return {"prompts": len(prompts), "training": len(prompts & training), "test": sorted(prompts & test)}


def corpus_stages(cell: Cell) -> tuple[str, str]:
    return f"synthesize/{cell.task}", f"filter/{cell.task}"


def plain_kl(cell: Cell) -> Report:
    """With the learning rate of the projection, which was not tuned for it."""
    return _distilled(cell, PlainLora)


def plain_ce(cell: Cell) -> Report:
    """On the teacher's text alone: what Trans-LoRA and TiTok come to."""
    return _distilled(cell, PlainLora, cross_entropy=True)


def long_fit(cell: Cell) -> Report:
    """What a transfer learns on its corpus in more and smaller steps."""
    return _distilled(cell, with_residual, fit=LONG_FIT)


def projection_only(cell: Cell) -> Report:
    return _distilled(cell, _projection_only)


def full_projection(cell: Cell) -> Report:
    """Without residual, and all of P learned instead of its part on the span."""
    return _distilled(cell, _full_projection)


def with_residual(transfer: Transfer, random_seed: int) -> Any:
    """What a transfer learns."""
    return transfer.projection(residual=True)


def _projection_only(transfer: Transfer, random_seed: int) -> Any:
    return transfer.projection(residual=False)


def _full_projection(transfer: Transfer, random_seed: int) -> Any:
    start = start_of(transfer.slots, transfer.target.widths, transfer.maps, None, whole_basis)
    return Projection(transfer.slots, start, residual=False)


def _distilled(
    cell: Cell,
    build: Callable[[Transfer, int], Any],
    *,
    cross_entropy: bool = False,
    fit: dict[str, int] | None = None,
) -> Report:
    """`fit`: what differs from the cell's."""
    config = cell.config()
    crosslora.transfer(config, until="filter")
    config = config.model_copy(update={"fit": config.fit.model_copy(update=fit)})
    made = alone(distil, config, corpus_stages(cell), build, cross_entropy)
    write_adapter(cell.folder, made.factors, config.target.base)
    return {
        "minutes": made.minutes,
        "steps": config.fit.steps,
        "batch_size": config.fit.batch_size,
        "tokens_per_second": made.tokens_per_second,
        "best_step": made.best_step,
        "held_out_loss": made.held_out[made.best_step],
        "verbatim": _verbatim(cell, RunFolder.open(config.run)),
    }


def gold(cell: Cell) -> Report:
    """TRL's GOLD, as far as it takes Gemma's tokenizer."""
    config = cell.config()
    crosslora.transfer(config, until="filter")
    return {
        **alone(trl.gold, config, corpus_stages(cell), cell.folder),
        "steps": config.fit.steps,
        "batch_size": config.fit.batch_size,
        "verbatim": _verbatim(cell, RunFolder.open(config.run)),
    }


def untrained(cell: Cell) -> Report:
    """`random`, `crop` and `closed_form` as an evaluation makes them."""
    source_base, target = cell.bases
    folders = resolve(source_base), resolve(target)
    write_adapter(
        cell.folder, baseline(cell.method, transfer_of(cell), *folders, cell.random_seed), target.base
    )
    return {}


def cross_lora(cell: Cell) -> Report:
    return _closed(cell, _cross_lora)


def cross_lora_signs(cell: Cell) -> Report:
    return _closed(cell, _cross_lora_signs)


def procrustes(cell: Cell) -> Report:
    """On the activations of the corpus that the trained methods share."""
    crosslora.transfer(cell.config(), until="filter")
    return _closed(cell, _procrustes)


def _closed(cell: Cell, make: Callable[[Cell], dict[str, LoraFactors]]) -> Report:
    write_adapter(cell.folder, alone(make, cell), cell.bases[1].base)
    return {}


def _cross_lora(cell: Cell) -> dict[str, LoraFactors]:
    return closed.cross_lora(transfer_of(cell), *cell.bases, None)


def _cross_lora_signs(cell: Cell) -> dict[str, LoraFactors]:
    return closed.cross_lora(transfer_of(cell), *cell.bases, torch.Generator().manual_seed(cell.random_seed))


def _procrustes(cell: Cell) -> dict[str, LoraFactors]:
    transfer, pair = transfer_of(cell), TokenizerPair.load(*cell.bases)
    train, _ = read_corpus(RunFolder.open(cell.config().run), *corpus_stages(cell))
    texts = [f"{sample.prompt}\n{sample.response}" for sample in train[:ALIGNED]]
    maps = closed.activation_maps(transfer, *cell.bases, pair, texts)
    return transfer.untrained(maps).lora_factors()


def transfer_of(cell: Cell) -> Transfer:
    adapter, pair = read_adapter(cell.source_adapter), TokenizerPair.load(*cell.bases)
    return build_transfer(adapter, *cell.bases, pair, cell.random_seed)


METHODS: dict[str, Callable[[Cell], Report]] = {
    "target_base": as_it_is,
    "teacher": as_it_is,
    "default": default,
    "five_seeds": five_seeds,
    "generic": generic,
    "real_prompts": real_prompts,
    "oracle": oracle,
    "plain_kl": plain_kl,
    "plain_ce": plain_ce,
    "projection_only": projection_only,
    "full_projection": full_projection,
    "random": untrained,
    "crop": untrained,
    "closed_form": untrained,
    "cross_lora": cross_lora,
    "cross_lora_signs": cross_lora_signs,
    "procrustes": procrustes,
    "long_fit": long_fit,
    "gold": gold,
}
