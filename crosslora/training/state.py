"""Trainable state as plain tensors: gathered from the engine at any ZeRO stage, and put back."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from crosslora.training.checkpoint import Tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


def trainable(engine: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def gather_parameters(engine: Any, keep: bool) -> Tensors:
    """Full float32 values of the trainable parameters. Every rank must call it (ZeRO gathers); none but those that `keep` them
    get any."""
    kept = {}
    for name, p in trainable(engine).items():
        value = safe_get_full_fp32_param(p) if _is_sharded(engine) else p.detach().float()
        if keep:
            kept[name] = value.cpu().clone()
    return kept


def gather_moments(engine: Any, keep: bool) -> Tensors:
    """Adam's moments, keyed `<parameter>.<moment>`; ranks as above."""
    kept = {}
    for name, p in trainable(engine).items():
        for key in MOMENTS:
            if _is_sharded(engine):
                value = safe_get_full_optimizer_state(p, key)
            else:
                value = engine.optimizer.state[p][key]
            if keep:
                kept[f"{name}.{key}"] = value.detach().cpu().clone()
    return kept


def restore(engine: Any, parameters: Tensors, moments: Tensors, adam_step: float) -> None:
    """Put gathered state back; the inverse of the two functions above."""
    _make_moments(engine)
    for name, p in trainable(engine).items():
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):  # what the forward pass reads
            p.data.copy_(parameters[name])
        values = {key: moments[f"{name}.{key}"].to(engine.device) for key in MOMENTS}
        if _is_sharded(engine):
            safe_set_full_fp32_param(p, parameters[name].to(engine.device))  # what the optimizer steps on
            for key, value in values.items():
                safe_set_full_optimizer_state(p, value, key)
        else:
            engine.optimizer.state[p] = {"step": torch.tensor(adam_step), **values}
    for state in _adam(engine).state.values():
        state["step"] = torch.tensor(adam_step)


def _make_moments(engine: Any) -> None:
    """Adam makes its state at its first step and ZeRO links to it there; a restored run needs both before."""
    adam, stage = _adam(engine), engine.zero_optimization_stage()
    groups = [group["params"] for group in adam.param_groups]
    if stage == 3:  # it hands its partitions to Adam for the time of a step only
        groups = [engine.optimizer.fp32_partitioned_groups_flat]
    for group in groups:
        for p in group:
            if not adam.state[p]:
                adam.state[p] = {key: torch.zeros_like(p) for key in MOMENTS}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam_step(engine: Any) -> float:
    """Adam's own count of steps."""
    states = list(_adam(engine).state.values())
    return float(states[0]["step"]) if states else 0.0


def _is_sharded(engine: Any) -> bool:
    return bool(engine.zero_optimization())


def _adam(engine: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer if _is_sharded(engine) else engine.optimizer
    return optimizer
