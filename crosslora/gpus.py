"""Kinds of GPU, from data sheets, and what a plan expects of them; the speeds of links and networks are nominal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    memory: float
    """Bytes."""
    flops: float
    """Dense bfloat16 operations per second, from the data sheet."""
    bandwidth: float
    """Bytes per second to its own memory, from the data sheet."""
    link: float
    """Bytes per second in one direction, all told, to the other GPUs of its node: half of what data sheets give for
    NVLink (A100, H100, H200) or PCIe 4.0 x16 (A10G, L4, L40S), which count both directions."""
    network: float
    """Bytes per second in one direction between nodes: an eighth of what AWS gives its nodes of 8 (g5, g6 and g6e
    .48xlarge, p4de, p5, p5en)."""
    dollars: float
    """Per hour, roughly what clouds asked in 2026; prices differ by a factor of two."""


GPUS = {
    "A10G-24GB": Gpu(24e9, 70e12, 600e9, 32e9, 1.6e9, 1.2),
    "L4-24GB": Gpu(24e9, 121e12, 300e9, 32e9, 1.6e9, 0.8),
    "L40S-48GB": Gpu(48e9, 362e12, 864e9, 32e9, 6.3e9, 1.9),
    "A100-80GB": Gpu(80e9, 312e12, 2.0e12, 300e9, 6.3e9, 2.5),
    "H100-80GB": Gpu(80e9, 989e12, 3.35e12, 450e9, 50e9, 4.0),
    "H200-141GB": Gpu(141e9, 989e12, 4.8e12, 450e9, 50e9, 5.0),
}
USABLE = 0.9
"""Of a GPU's memory; the rest goes to fragments."""
FIT_SHARE, PREFILL_SHARE, DECODE_SHARE = 0.4, 0.4, 0.5
"""Of the peak of operations, of the same, and of the bandwidth."""
NODE = 8
"""GPUs of a node. Tensor parallelism stays inside one."""
