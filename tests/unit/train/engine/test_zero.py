"""What DeepSpeed is told."""

import pytest

from configs.program.errors import UserError
from train.config.engine import DeepSpeedConfig, HardwareConfig
from train.config.lora import LoraConfig
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.zero import deepspeed_config


@pytest.mark.parametrize(
    ("of_node", "processes", "group"),
    [("8", 16, 8), ("2", 4, 2), ("8", 8, None), (None, 16, None)],
)
def test_a_nodes_copy_is_shared_by_its_processes(
    of_node: str | None, processes: int, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one node there is nothing to copy; a plan without a launcher knows of one."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if of_node:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_node)
    config = TrainConfig(deepspeed=DeepSpeedConfig(node_copy=True))
    config.deepspeed.check()
    told = deepspeed_config(config, BatchArithmetic(1, 1, processes))
    assert told["zero_optimization"].get("zero_hpz_partition_size") == group
    config.deepspeed.node_copy = False
    told = deepspeed_config(config, BatchArithmetic(1, 1, processes))
    assert "zero_hpz_partition_size" not in told["zero_optimization"]


@pytest.mark.parametrize(("of_node", "processes"), [("1", 2), ("8", 12)])
def test_nodes_that_can_keep_no_copy_are_told(of_node: str, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", of_node)
    config = TrainConfig(deepspeed=DeepSpeedConfig(node_copy=True))
    with pytest.raises(UserError, match=rf"^deepspeed\.node_copy=true: a node has {of_node} of the {processes}"):
        deepspeed_config(config, BatchArithmetic(1, 1, processes))


@pytest.mark.parametrize("other", [{"stage": 2}, {"offload_param": "cpu"}])
def test_a_copy_of_what_is_not_sharded_over_gpus_is_refused(other: dict[str, int | str]) -> None:
    with pytest.raises(UserError, match=r"^deepspeed\.node_copy=true: "):
        DeepSpeedConfig(node_copy=True, **other).check()


def test_a_bucket_for_what_is_gathered_ahead_is_that_of_sums_unless_told() -> None:
    for ahead, expected in ((0, 70), (30, 30)):
        config = TrainConfig(deepspeed=DeepSpeedConfig(bucket_size=70, prefetch_bucket_size=ahead))
        zero = deepspeed_config(config, BatchArithmetic(1, 1, 2))["zero_optimization"]
        assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (70, expected)


@pytest.mark.parametrize(("device", "overlap"), [("cuda", True), ("cpu", False)])
def test_a_plan_is_for_the_device_of_the_plan(device: str, overlap: bool) -> None:
    config = TrainConfig(hardware=HardwareConfig(device=device))
    assert deepspeed_config(config, BatchArithmetic(1, 1, 8))["zero_optimization"]["overlap_comm"] == overlap


@pytest.mark.parametrize(("stage", "forward"), [(0, 0), (1, 0), (2, 0), (3, 3)])
def test_what_only_goes_forward_shards_no_optimizer(stage: int, forward: int) -> None:
    offload = {"offload_optimizer": "cpu" if stage else "none"}
    config = TrainConfig(deepspeed=DeepSpeedConfig(stage=stage, **offload))
    told = deepspeed_config(config, BatchArithmetic(1, 1, 1), trains=False)
    assert told["zero_optimization"]["stage"] == forward
    assert "offload_optimizer" not in told["zero_optimization"]
    assert deepspeed_config(config, BatchArithmetic(1, 1, 1))["zero_optimization"]["stage"] == stage


def test_gradients_are_never_summed_in_bfloat16() -> None:
    for stage in (2, 3):
        told = deepspeed_config(TrainConfig(deepspeed=DeepSpeedConfig(stage=stage)), BatchArithmetic(1, 4, 1))
        assert told["data_types"] == {"grad_accum_dtype": "fp32"}
    config = TrainConfig(deepspeed=DeepSpeedConfig(stage=1), lora=LoraConfig(method="none"))
    with pytest.raises(UserError, match=r"^deepspeed\.stage=1: with model\.dtype=bfloat16 .* use deepspeed=zero2"):
        config.check()
    config.model.dtype = "float32"
    config.check()
