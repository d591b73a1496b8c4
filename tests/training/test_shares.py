"""What workers of ZeRO-3 take out of the files is the base, whatever dtype the files have."""

import os
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from crosslora.endpoint import free_port
from tests.tiny import bare_config, tiny_gemma


def load_in_shares(rank: int, folders: dict[str, str], port: int) -> None:
    """As one of two fit workers, in each dtype."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    from crosslora.training.loop import join_group

    join_group("gloo")
    for dtype, folder in folders.items():
        compare(folder, dtype)
    # a process that ends while its group's threads run may be aborted
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def compare(folder: str, dtype: str) -> None:
    """Every weight that is gathered, and every buffer, is the plain model's."""
    import deepspeed

    from crosslora.models import load_model
    from crosslora.training.loop import load_base

    fit = {"zero_stage": 3, "workers": 2, "batch_size": 2, "dtype": dtype}
    shared, plain = load_base(bare_config(target={"base": folder}, fit=fit)), load_model(folder, dtype)
    for name, parameter in shared.named_parameters():
        assert parameter.numel() == 0 and parameter.ds_tensor.dtype == getattr(torch, dtype), name
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // 2), name
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter, plain.get_parameter(name)), name
    for name, buffer in shared.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name


@pytest.mark.real
def test_shares_are_those_of_the_plain_model(tmp_path: Path) -> None:
    stored = {"float32": torch.bfloat16, "bfloat16": torch.float32}
    folders = {dtype: str(tiny_gemma(tmp_path / dtype, dtype=of_files)) for dtype, of_files in stored.items()}
    spawn(load_in_shares, (folders, free_port("127.0.0.1", 0)), nprocs=2)
