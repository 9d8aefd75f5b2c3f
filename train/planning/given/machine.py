"""The machine of a plan: rates and sizes, by data sheet and assumption, or measured here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from train.config.cluster import ClusterConfig

GB = 1e9


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process has. Rates are what is reached, not what the data sheet promises."""

    name: str
    on_cuda: bool
    grouped: bool
    """Whether the experts' products are one grouped product."""
    processes: int
    nodes: int
    memory: float
    """Bytes that a process may take on its device."""
    host_memory: float
    """Bytes of a node."""
    runtime: float
    """Bytes that are not tensors: on a GPU beside them, on a CPU the program itself."""
    flops: float
    """Operations per second of products."""
    bandwidth: float
    """Bytes per second that a pass over the memory moves, read and written."""
    link: float
    """Bytes per second that a process receives in a collective within its node; 0 if that isn't known."""
    network: float
    """The same of a node, from the others."""
    host_link: float
    disk: float
    price: float
    """US dollars for a process and hour."""
    overhead: float
    """Seconds that an operation takes however little it does."""
    is_measured: bool
    layer: Mapping[str, float] = field(default_factory=dict)
    """Seconds of one layer's `forward` and `backward`, of the `head` and of what is `around` them, measured for the
    run's own micro-batch of that many `tokens`; empty if they weren't."""
    beside: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By ZeRO stage, seconds that a step takes however little it computes: see `given.beside`; empty if they weren't
    measured."""


def of_catalogue(config: ClusterConfig, dtype: str) -> Machine:
    """A machine by its data sheet and the assumptions of its settings."""
    peak = config.peak if dtype == "bfloat16" else config.peak_float32
    return Machine(
        name=f"{config.nodes} × " * (config.nodes > 1) + f"{config.gpus} × {config.gpu}",
        on_cuda=True,
        grouped=config.grouped and dtype == "bfloat16",
        processes=config.gpus * config.nodes,
        nodes=config.nodes,
        memory=config.memory * GB,
        host_memory=config.host_memory * GB,
        runtime=config.reserve * GB,
        flops=peak * 1e12 * config.product_share,
        bandwidth=config.bandwidth * GB * config.memory_share,
        link=config.link * GB * config.link_share,
        network=config.network * GB * config.link_share,
        host_link=config.host_link * GB * config.link_share,
        disk=config.disk * GB,
        price=config.price,
        overhead=5e-6,
        is_measured=False,
    )
