"""The planned seconds: their arithmetic against another count, and which way they go."""

from dataclasses import replace

import pytest
import torch

from train.config.catalogue import clusters
from train.config.engine import DeepSpeedConfig, HardwareConfig
from train.config.lora import LoraConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import TrainConfig
from train.engine.processes import join_processes
from train.lora.attach import trainable
from train.model.work import of_training
from train.planning.given import beside
from train.planning.given.layer import seconds_of_layer
from train.planning.given.machine import Machine, of_catalogue
from train.planning.given.rows import Rows
from train.planning.given.sizes import planned_model, sizes_of
from train.planning.speed import speed

ROWS = Rows(length=1024, tokens=1024, supervised=0.5, conversation=256, of_epoch=0, said="")
SIZES = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}


def config_of(**settings: object) -> TrainConfig:
    architecture = ArchitectureConfig(hidden_size=512, intermediate_size=1792, **SIZES)
    return TrainConfig(model=ModelConfig(architecture=architecture), lora=LoraConfig(rank=8), **settings)  # type: ignore[arg-type]


def of_arithmetic_alone(**others: float) -> Machine:
    """A machine for which only operations take time: seconds are operations."""
    machine = of_catalogue(replace(clusters()["h100_8"], grouped=False), "bfloat16")
    alone = {"flops": 1.0, "link": 0.0, "bandwidth": 1e30, "host_link": 1e30, "overhead": 0.0, "processes": 1}
    return replace(machine, **(alone | others))


def test_operations_are_those_that_are_counted_by_parameter() -> None:
    """`train.model.work` adds up the shapes of what trains, and counts pairs of tokens."""
    config = config_of(activation_checkpointing="none", global_batch=1, deepspeed=DeepSpeedConfig(stage=0))
    planned = speed(config, sizes_of(config), ROWS, config.batch(1), of_arithmetic_alone())
    model, _ = planned_model(config)
    trained = {name: tuple(parameter.shape) for name, parameter in trainable(model)}
    pairs = ROWS.length * ROWS.conversation / 2
    needed = of_training(model.config.to_dict(), trained).flops(ROWS.length, pairs, ROWS.length * ROWS.supervised)
    # work leaves out the first layer's input gradient, the plan leaves out the routers
    assert planned.step == pytest.approx(needed, rel=0.01)


def test_what_is_computed_again_takes_what_its_forward_took() -> None:
    parts = {}
    for again in ("attention", "full"):
        config = config_of(activation_checkpointing=again, global_batch=1, deepspeed=DeepSpeedConfig(stage=0))
        parts[again] = speed(config, sizes_of(config), ROWS, config.batch(1), of_arithmetic_alone()).parts
    assert parts["full"]["recomputed"] == parts["full"]["forward"]
    assert 0 < parts["attention"]["recomputed"] < 0.3 * parts["attention"]["forward"]


def test_offloaded_weights_come_over_the_host_link_even_for_one_process() -> None:
    config = config_of(
        activation_checkpointing="none",
        global_batch=1,
        deepspeed=DeepSpeedConfig(stage=3, offload_param="cpu", offload_optimizer="cpu", persistence_threshold=0),
    )
    sizes = sizes_of(config)
    machine = of_arithmetic_alone(flops=1e30, host_link=1e9)
    planned = speed(config, sizes, ROWS, config.batch(1), machine)
    assert planned.bound == "host link"
    # as few weights as these stay from the forward to the backward, and are gathered once
    assert planned.parts["gathers"] == pytest.approx(sizes.bytes / 1e9)


def test_a_layer_that_was_measured_is_what_a_step_is_made_of() -> None:
    """Of another micro-batch and with more computed again, in proportion to the arithmetic."""
    config = config_of(activation_checkpointing="none", global_batch=2, deepspeed=DeepSpeedConfig(stage=0))
    sizes = sizes_of(config)
    layer = seconds_of_layer(config, sizes, ROWS, torch.device("cpu"))
    assert layer["tokens"] == ROWS.length
    assert all(layer[name] > 0 for name in ("forward", "backward", "head"))
    machine = replace(of_arithmetic_alone(), layer=layer)
    parts = speed(config, sizes, ROWS, config.batch(1), machine).parts
    assert parts["forward"] == pytest.approx(2 * 6 * layer["forward"])
    assert parts["backward"] == pytest.approx(2 * 6 * layer["backward"])
    assert parts["head"] == pytest.approx(2 * layer["head"])
    config.micro_batch, config.activation_checkpointing = 2, "full"
    parts = speed(config, sizes, ROWS, config.batch(1), machine).parts
    assert parts["recomputed"] == parts["forward"] == pytest.approx(2 * 6 * layer["forward"])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # DeepSpeed's imports
def test_a_narrow_mixtral_takes_a_step_at_every_stage_and_none_of_it_is_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What DeepSpeed takes is measured at all stages; as many of a layer's tensors are sharded as in the run."""
    monkeypatch.setattr(beside, "STEPS", 5)
    config = config_of(activation_checkpointing="none", global_batch=1, deepspeed=DeepSpeedConfig(stage=0))
    sizes, processes = sizes_of(config), join_processes(HardwareConfig(device="cpu"))
    found = beside.seconds_beside(config, sizes, processes)
    names = ("micro-step", "micro-step of a layer", "update", "update of a layer")
    assert {stage: tuple(sorted(of_stage)) for stage, of_stage in found.items()} == dict.fromkeys("023", names)
    for of_stage in found.values():
        assert min(of_stage.values()) >= 0
        assert of_stage["update"] + of_stage["update of a layer"] > 0
    for threshold in (0, 10_000, 300_000, 10**9):
        config.deepspeed.persistence_threshold = threshold
        narrow = beside.narrow_config(config, 3, sizes, 1, processes.count)
        sharded = [
            sum(t.elements >= each.deepspeed.persistence_threshold for t in beside.of_layer(sizes_of(each)))
            for each in (config, narrow)
        ]
        assert abs(sharded[1] - sharded[0]) <= 7, "equal sizes of the narrow one are sharded together"
        assert (sharded[0] == 0) == (sharded[1] == 0)


def test_what_a_step_takes_beside_computing_is_added_for_each_micro_step_and_layer() -> None:
    config = config_of(activation_checkpointing="none", global_batch=3, deepspeed=DeepSpeedConfig(stage=2))
    sizes, batch = sizes_of(config), config.batch(1)
    assert batch.accumulation == 3
    took = {"micro-step": 1.0, "micro-step of a layer": 10.0, "update": 100.0, "update of a layer": 1000.0}
    machine = of_arithmetic_alone(flops=1e30)
    plain = speed(config, sizes, ROWS, batch, machine)
    planned = speed(config, sizes, ROWS, batch, replace(machine, beside={"2": took, "3": {}}))
    assert planned.step - plain.step == pytest.approx(3 * (1 + 6 * 10) + 100 + 6 * 1000)
    assert planned.bound == "launching operations"
