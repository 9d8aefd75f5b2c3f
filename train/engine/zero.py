"""DeepSpeed's configuration of a run, and sharded parameters made whole."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from configs.program.errors import UserError
from configs.program.launch import local_processes
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.processes import uses_cuda
from train.model.projections import Attention


def deepspeed_config(config: TrainConfig, batch: BatchArithmetic, *, trains: bool = True) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, or of one that `trains` nothing and only goes forward."""
    # Stages 1 and 2 shard what an optimizer has, and DeepSpeed asks for one.
    stage = config.deepspeed.stage if trains or config.deepspeed.stage == 3 else 0
    zero: dict[str, Any] = {"stage": stage}
    if stage > 0:
        size = config.deepspeed.bucket_size
        # Overlapping needs streams, which only CUDA has.
        zero |= {"reduce_bucket_size": size, "overlap_comm": uses_cuda(config.hardware)}
    if stage == 3:
        # Attention and the MoE block compute with the parameters of their modules without calling these.
        zero |= {
            "leaf_module": {"classes": [Attention.__name__, MixtralSparseMoeBlock.__name__]},
            "stage3_prefetch_bucket_size": config.deepspeed.prefetch_bucket_size or size,
            "stage3_param_persistence_threshold": config.deepspeed.persistence_threshold,
            "stage3_max_live_parameters": config.deepspeed.max_live_parameters,
        }
        if config.deepspeed.node_copy and (of_node := _processes_of_a_node(batch.processes)) < batch.processes:
            zero["zero_hpz_partition_size"] = of_node
    for name in ("offload_optimizer", "offload_param") if trains else ("offload_param",):
        if getattr(config.deepspeed, name) != "none":
            zero[name] = {"device": getattr(config.deepspeed, name), "pin_memory": uses_cuda(config.hardware)}
    # Sums of many micro-batches' gradients lose bits in bfloat16; only the shards of what trains pay for this.
    sums: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}} if stage > 1 else {}
    if stage == 0:
        # `TrainedState` has gradients summed in float32 there; DeepSpeed would round the sums between processes.
        sums = {"communication_data_type": "fp32"}
    return sums | {
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "train_batch_size": batch.rows,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _processes_of_a_node(count: int) -> int:
    """How many of `count` processes are on each node, for `deepspeed.node_copy`; all, if no launcher says.

    Raises:
        UserError: nodes differ, or have one each.
    """
    of_node = local_processes() or count
    if count % of_node or of_node == 1 < count:
        raise UserError(
            f"deepspeed.node_copy=true: a node has {of_node} of the {count} processes; it takes nodes with two or more "
            f"each and the same number on all; leave it out"
        )
    return of_node


@contextlib.contextmanager
def gathered_whole(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within it, parameters that ZeRO-3 has sharded are whole, and keep what process 0 writes into them; collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=0):
        yield


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape; under ZeRO-3 its own is empty, and ds_shape is what it was."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
