"""What vLLM loads with a served model."""

from vllm.lora.request import LoRARequest

from crosslora import vllm_worker


def test_versions_of_an_adapter_are_told_apart() -> None:
    assert vllm_worker.EndsWithReplica
    versions = [LoRARequest("mine", number, f"/mine-{number}") for number in (1, 2)]
    assert len({*versions}) == 2
    assert versions[0] == LoRARequest("mine", 1, "/mine-1")
