"""Span reduction against the full map, fused linears, and the student against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config

from crosslora.adapter import LoraFactors, read_adapter, write_adapter
from crosslora.errors import UserError
from crosslora.projection.initial import random_map, residual_map, start_maps
from crosslora.projection.mapping import build_slots, layer_map, split_roles
from crosslora.projection.projection import Projection, SpaceMap
from crosslora.projection.start import UNIT, span_basis, start_of, whole_basis
from crosslora.projection.student import Student, check_logits
from crosslora.topology import READS, WRITES, Topology, discover
from tests.tiny import tiny_gemma, tiny_llama, tiny_lora

PHI = Phi3Config(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def test_logits_that_the_base_scales_in_its_own_way_are_refused(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_gemma(tmp_path))
    check_logits(base)
    forward = base.forward

    def scaled(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = 3 * output.logits
        return output

    base.forward = scaled
    with pytest.raises(UserError, match="computes its logits in a way"):
        check_logits(base)


def test_the_span_gives_the_outputs_and_gradients_of_the_full_map() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 6, generator=generator)
    P0 = random_map(12, 20, generator)
    small, full = (
        SpaceMap(P0 @ vectors, UNIT * (basis(vectors).T @ vectors), residual=False)
        for basis in (span_basis, whole_basis)
    )
    torch.testing.assert_close(small(), P0 @ vectors)
    Q = span_basis(vectors)
    with torch.no_grad():
        full.D.copy_(torch.randn(12, 20, generator=generator))
        small.D.copy_(full.D @ Q)
    torch.testing.assert_close(small(), full(), atol=1e-4, rtol=1e-4)
    weights = torch.randn(12, 6, generator=generator)
    for each in (small, full):
        (each() * weights).sum().backward()
    assert small.D.grad is not None and full.D.grad is not None
    torch.testing.assert_close(full.D.grad @ Q, small.D.grad, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    source = tiny_llama(root / "source")
    return source, tiny_gemma(root / "target"), tiny_lora(root / "lora", source)


def maps_of(source: Topology, target: Topology) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    residual = random_map(target.widths["residual"], source.widths["residual"], generator)
    return start_maps(residual, source.widths, target.widths, 0)


def project(
    factors: dict[str, LoraFactors], source: Topology, target: Topology, zero: bool = False
) -> Projection:
    maps = maps_of(source, target)
    slots = build_slots(factors, source, target)
    start = start_of(slots, target.widths, maps, None if zero else maps, span_basis)
    return Projection(slots, start, residual=True)


@pytest.mark.parametrize("fused", [False, True])
def test_factors_are_those_of_the_formula(pair: tuple[Path, Path, Path], fused: bool) -> None:
    """Of every layer and role, also where one linear holds several: B_t A_t = P_out B_s A_s P_in^T."""
    source = discover(AutoConfig.from_pretrained(pair[0]))
    target = discover(PHI if fused else AutoConfig.from_pretrained(pair[1]))
    factors, maps = read_adapter(pair[2]).factors, maps_of(source, target)
    mapped = project(factors, source, target).lora_factors()
    by_role, layers = split_roles(factors, source), layer_map(source.num_layers, target.num_layers)
    assert len({A.sum().item() for A, _ in by_role.values()}) == len(by_role), "no two are the same"
    for linear in target.linears:
        update = mapped[linear.path].B @ mapped[linear.path].A
        for role, rows in zip(linear.roles, update.split(linear.widths), strict=True):
            A_s, B_s = by_role[layers[linear.layer], role]
            wanted = (maps[WRITES[role]] @ B_s) @ (A_s @ maps[READS[role]].T)
            torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=1e-4, msg=f"{linear.path} {role}")


def test_a_rotation_of_the_embeddings_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    rows = torch.randn(300, 24, generator=generator)
    torch.testing.assert_close(residual_map(rows, rows @ rotation.T), rotation, atol=1e-4, rtol=0)


def test_fused_target_and_back(pair: tuple[Path, Path, Path]) -> None:
    llama, phi = discover(AutoConfig.from_pretrained(pair[0])), discover(PHI)
    there = project(read_adapter(pair[2]).factors, llama, phi)
    factors = there.lora_factors()
    fused = factors["model.layers.0.self_attn.qkv_proj"]
    assert fused.A.shape == (12, 32) and fused.B.shape == (64, 12)
    for block, (rows, role) in enumerate([((0, 32), "query"), ((32, 48), "key"), ((48, 64), "value")]):
        ranks = slice(4 * block, 4 * block + 4)
        own = fused.B[rows[0] : rows[1], ranks] @ fused.A[ranks]
        torch.testing.assert_close((fused.B @ fused.A)[rows[0] : rows[1]], own, msg=role)
    back = project(factors, phi, llama).lora_factors()
    assert back.keys() == read_adapter(pair[2]).factors.keys()
    cut = split_roles(factors, phi)
    assert torch.equal(cut[0, "key"][1], fused.B[32:48]) and cut[0, "key"][0] is fused.A


def test_the_student_is_the_base_with_the_written_adapter(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    ids = torch.arange(10, 40).reshape(2, 15)
    with torch.no_grad():
        plain = base(ids).logits
        source, target = (discover(AutoConfig.from_pretrained(folder)) for folder in pair[:2])
        projection = project(read_adapter(pair[2]).factors, source, target)
        student = Student(base, projection)
        logits = student.logits(student(ids))
        write_adapter(tmp_path / "out", projection.lora_factors(), str(pair[1]))
        fresh = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
        wanted = PeftModel.from_pretrained(fresh, tmp_path / "out").eval()(ids).logits
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert (logits - plain).abs().max() > 1e-2
        again = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
        zero = Student(again, project(read_adapter(pair[2]).factors, source, target, zero=True))
        assert torch.equal(zero.logits(zero(ids)), plain)


def test_parameters_come_in_one_order_whatever_that_of_the_file(pair: tuple[Path, Path, Path]) -> None:
    """Workers that share parameters out by ZeRO-3 send them to each other one after the other."""
    source, target = (discover(AutoConfig.from_pretrained(folder)) for folder in pair[:2])
    slots = build_slots(read_adapter(pair[2]).factors, source, target)
    maps = start_maps(
        torch.eye(target.widths["residual"], source.widths["residual"]), source.widths, target.widths, 0
    )
    start = start_of(slots, target.widths, maps, None, span_basis)
    reversed_ = dict(reversed(start.items()))
    one, other = (Projection(slots, each, residual=True) for each in (start, reversed_))
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in other.named_parameters()]
