"""The plan as a person reads it."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from crosslora.gpu_plan import GpuPlan
from crosslora.plan import AdapterPlan, Plan
from crosslora.progress import output

MEMORY = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "lora": "LoRA",
    "learned": "learned",
    "activations": "activations",
    "working": "working",
    "other": "other",
    "total": "total",
}
"""Columns, as the JSON and as the table name them."""


def show(plan: Plan) -> None:
    console = output()
    console.print(f"Layers: {len(plan.layer_map)} target layers take source layers {plan.layer_map}")
    console.print(f"Unused source layers: {plan.unused_source_layers or 'none'}")
    if plan.unmapped_modules:
        console.print(f"Target linears without a role, left as they are: {', '.join(plan.unmapped_modules)}")
    console.print(
        f"Vocabulary: {plan.shared_tokens:,} tokens with the same bytes, of {plan.teacher_vocabulary:,} (source) "
        f"and {plan.student_vocabulary:,} (target)"
    )
    console.print(f"Corpus: at most {plan.corpus_megabytes:g} MB")
    memory = ", ".join(f"{stage} {amount:g} GB" for stage, amount in plan.memory_gigabytes.items())
    console.print(f"Memory: about {memory}")
    for warning in plan.warnings:
        console.print(f"[yellow]Warning:[/yellow] {escape(warning)}")
    for adapter in plan.adapters:
        console.print(_table(adapter))
    if plan.on_gpus is not None:
        console.print(_gpu_table(plan.on_gpus))
        console.print(memory_table(plan.on_gpus))
        console.print(
            f"Network: every node loads {plan.on_gpus.gigabytes_loaded:,.0f} GB of weights, every fit worker reads the corpus"
        )
        console.print(plan.on_gpus.advice, soft_wrap=True)


def _table(adapter: AdapterPlan) -> Table:
    title = (
        f"{adapter.name}: rank {adapter.rank}, {adapter.modules} source and {adapter.target_modules} target modules, "
        f"{adapter.learned_numbers:,} learned numbers"
    )
    table = Table(title=title, title_justify="left")
    for column in ("space", "source width", "target width", "input span", "output span"):
        table.add_column(column, justify="left" if column == "space" else "right")
    for name, space in adapter.spaces.items():
        values = (space.source_width, space.target_width, space.input_span, space.output_span)
        table.add_row(name, *(str(value) for value in values))
    return table


def _gpu_table(plan: GpuPlan) -> Table:
    smallest = f"{plan.smallest} would do" if plan.smallest else "1024 are too few"
    title = f"On {plan.gpus} x {plan.gpu} ({smallest}); counted, not measured"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "GPUs", "GB per GPU", "hours", "dollars", "GB sent per GPU"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    stages = {
        "synthesize": plan.synthesize,
        "fit": plan.fit,
        "evaluate": plan.evaluate,
    }
    for name, stage in stages.items():
        if stage is not None:
            numbers = (
                f"{stage.gigabytes:.1f}",
                f"{stage.hours:.2f}",
                f"{stage.dollars:.2f}",
                f"{stage.gigabytes_sent:,.0f}",
            )
            table.add_row(name, str(stage.gpus), *numbers)
    return table


def memory_table(plan: GpuPlan) -> Table:
    table = Table(
        title="GB per GPU (learned: with what Adam keeps)", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("")
    for title in MEMORY.values():
        table.add_column(title, justify="right")
    for name, row in plan.memory.items():
        table.add_row(name, *(f"{row[part]:.1f}" if part in row else "" for part in MEMORY))
    return table
