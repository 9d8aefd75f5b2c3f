"""Where a pretrained base's parameters go: whole onto the device, or a process's partition of each under ZeRO-3."""

from typing import Any

import torch
from torch import nn

from data.disk.loading.model import Allocate, whole_on
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.zero import deepspeed_config


def allocator_for(config: TrainConfig, batch: BatchArithmetic, device: torch.device) -> Allocate:
    """What allocates the base of a run on this process."""
    if config.deepspeed.stage == 3 and config.model.path is not None:
        return _partition(config, batch)
    return whole_on(device)


def _partition(config: TrainConfig, batch: BatchArithmetic) -> Allocate:
    """What allocates this process's partition of each parameter and, if the run has one, of the node's copy.

    `deepspeed.zero.Init` would make each parameter whole first, and send it from process 0 to the others.
    """
    from deepspeed.runtime.zero.partition_parameters import Init, PartitionedParamStatus, free_param

    # The module is what tells it to change torch's linear layers, as it does for a model that is made within it.
    init = Init(module=nn.Module(), config_dict_or_path=deepspeed_config(config, batch))

    def buffer(numbers: int, dtype: torch.dtype, device: torch.device | str) -> Any:
        tensor: Any = torch.zeros(numbers, dtype=dtype, device=device)  # zeros: the last process's padding stays
        if init.pin_memory and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        tensor.ds_numel, tensor.status, tensor.final_location = numbers, PartitionedParamStatus.AVAILABLE, None
        return tensor

    def allocate(name: str, parameter: torch.Tensor) -> tuple[nn.Parameter, list[tuple[int, torch.Tensor]]]:
        # A shape without memory: DeepSpeed notes it, and then it is freed.
        shape = torch.empty(1, dtype=parameter.dtype, device=init.local_device).expand(parameter.shape)
        sharded: Any = nn.Parameter(shape, requires_grad=parameter.requires_grad)
        init._convert_to_deepspeed_param(sharded)
        sharded.ds_numel_aligned = init._aligned_size(sharded)
        numbers = sharded.ds_numel_aligned // init._partition_world_size(sharded)
        device = init.local_device if sharded.ds_persist else init.remote_device
        sharded.ds_tensor = buffer(numbers, sharded.dtype, device)
        held = [(numbers * init._partition_rank(sharded), sharded.ds_tensor)]
        if init.zero_param_process_group is not None:
            numbers = sharded.ds_numel_aligned // init.num_ranks_in_param_group
            sharded.ds_secondary_tensor = buffer(numbers, sharded.dtype, init.remote_device)
            held.append((numbers * init.rank_in_group, sharded.ds_secondary_tensor))
        free_param(sharded)
        # The padding is in no file.
        whole = parameter.numel()
        return sharded, [(start, tensor[: whole - start]) for start, tensor in held if start < whole]

    return allocate
