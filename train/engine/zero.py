"""DeepSpeed's configuration of a run, and parameters that ZeRO-3 has sharded made whole."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from configs.program.errors import UserError
from configs.program.launch import local_processes
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.processes import uses_cuda


def deepspeed_config(config: TrainConfig, batch: BatchArithmetic) -> dict[str, Any]:
    """The DeepSpeed configuration of a run."""
    zero: dict[str, Any] = {"stage": config.deepspeed.stage}
    if config.deepspeed.stage > 0:
        size = config.deepspeed.bucket_size
        # Overlapping needs streams, which only CUDA has.
        zero |= {"reduce_bucket_size": size, "overlap_comm": uses_cuda(config.hardware)}
    if config.deepspeed.stage == 3:
        # The MoE block is gathered as one leaf by DeepSpeed's default list: naming leaves here would replace that list.
        zero |= {
            "stage3_prefetch_bucket_size": config.deepspeed.prefetch_bucket_size or size,
            "stage3_param_persistence_threshold": config.deepspeed.persistence_threshold,
            "stage3_max_live_parameters": config.deepspeed.max_live_parameters,
        }
        if config.deepspeed.node_copy and (of_node := _processes_of_a_node(batch.processes)) < batch.processes:
            zero["zero_hpz_partition_size"] = of_node
    for name in ("offload_optimizer", "offload_param"):
        if getattr(config.deepspeed, name) != "none":
            zero[name] = {"device": getattr(config.deepspeed, name), "pin_memory": uses_cuda(config.hardware)}
    # Sums of many micro-batches' gradients lose bits in bfloat16; only the shards of what trains pay for this.
    sums: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}} if config.deepspeed.stage > 1 else {}
    if config.deepspeed.stage == 0:
        sums = {"communication_data_type": "fp32"}  # DeepSpeed would round them to bfloat16; `Engine` makes them
    return sums | {
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "train_batch_size": batch.rows,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # GuardedAdamW is an AdamW, which DeepSpeed knows by its exact type
        "steps_per_print": 2**31,
    }


def _processes_of_a_node(count: int) -> int:
    """Of `count` processes those on each node, for `deepspeed.node_copy`; all, where no launcher says.

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
def partitioned_loading(config: TrainConfig, batch: BatchArithmetic) -> Iterator[None]:
    """Within it, transformers loads pretrained weights straight into ZeRO-3's shards, where the run has any.

    Process 0 reads the files, into CPU memory, and the others receive their parts; no GPU ever holds the whole model.
    """
    if config.deepspeed.stage != 3 or config.model.path is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(deepspeed_config(config, batch))  # transformers holds only a weak reference
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def gathered_whole(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within it, parameters that ZeRO-3 has sharded are whole, and keep what process 0 writes into them; collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=0):
        yield


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape; under ZeRO-3 its own is empty, and ds_shape is what it was."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
