"""What vLLM loads with a served model."""

from vllm.lora.request import LoRARequest

import crosslora.vllm_worker  # noqa: F401 - what it does to vLLM is tested


def test_versions_of_an_adapter_are_told_apart() -> None:
    versions = [LoRARequest("mine", number, f"/mine-{number}") for number in (1, 2)]
    assert len({*versions}) == 2
    assert versions[0] == LoRARequest("mine", 1, "/mine-1")
