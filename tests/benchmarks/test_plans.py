"""The tables of docs/cluster.md are what the plan counts, and the plan counts what a student has: those of 70B are built on
the meta device, shapes without numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.plans import CONFIG, LARGE_KIND, MODELS, RANK, Plans, learned_numbers
from crosslora.adapter import LoraFactors
from crosslora.gpu_plan import gpu_plan
from crosslora.projection import build
from crosslora.projection.build import Transfer
from crosslora.projection.mapping import build_slots
from crosslora.projection.student import Student
from crosslora.sizing import Shape
from crosslora.topology import discover, meta_model

ROOT = Path(__file__).parent.parent.parent
PUBLISHED = {"Qwen2.5-72B": 72_706_203_648, "Llama-3.1-8B": 8_030_261_248}
"""Parameters, as the hub counts them in the weights."""


def test_the_documentation_shows_what_is_counted() -> None:
    plans = Plans()
    shown = [*plans.large(), *plans.worked(), *plans.everyday()]
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert [line for line in shown if line not in text] == []
    assert json.loads((ROOT / "benchmarks" / "plans.json").read_text()) == json.loads(json.dumps(plans.made))


def student_of(source_name: str, target_name: str) -> Student:
    """Target base in bfloat16 and the projection of an adapter of all linears of the source."""
    source, target = discover(MODELS[source_name]), discover(MODELS[target_name])
    with torch.device("meta"):
        factors = {
            linear.path: LoraFactors(torch.empty(RANK, linear.d_in), torch.empty(linear.d_out, RANK))
            for linear in source.linears
        }
        maps = {space: torch.empty(width, source.widths[space]) for space, width in target.widths.items()}
        transfer = Transfer(build_slots(factors, source, target), source, target, maps)
        base: Any = meta_model(MODELS[target_name]).to(torch.bfloat16).requires_grad_(False)
        base.base_model.register_forward_pre_hook(with_mask, with_kwargs=True)
        return Student(base, transfer.projection(residual=True))


def with_mask(module: nn.Module, positional: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A causal mask that transformers takes as it is: to make one, it looks at numbers, and here are none."""
    rows, length = named["input_ids"].shape
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bfloat16, device="meta")
    return positional, {**named, "attention_mask": mask}


@pytest.mark.parametrize(
    ("source", "target"), [("Llama-3.1-70B", "Qwen2.5-72B"), ("Llama-3.1-70B", "Llama-3.1-8B")]
)
def test_a_student_has_the_numbers_that_are_planned(
    source: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No source layer feeds two of the target here, so the vectors of an adapter span all that they can."""
    monkeypatch.setattr(
        build, "span_basis", lambda vectors: vectors.new_empty(len(vectors), min(vectors.shape))
    )
    student, shape = student_of(source, target), Shape.of(MODELS[target])
    assert parameters(student.base) == shape.parameters == PUBLISHED[target]
    learned = learned_numbers(Shape.of(MODELS[source]), shape)
    assert parameters(student.projection) == learned
    plan = gpu_plan(
        CONFIG, Shape.of(MODELS[source]), shape, ranks=(RANK, RANK), learned=learned, gpu=LARGE_KIND, gpus=8
    )
    assert plan.fit is not None, plan.advice
    # every factor fits its linear
    share = plan.fit.settings["fit.batch_size"] // plan.fit.settings["fit.workers"]
    ids = torch.zeros(share, 16, dtype=torch.long, device="meta")
    assert student.logits(student(ids)).shape == (share, 16, shape.vocabulary)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
