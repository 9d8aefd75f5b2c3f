"""Settings of the machine that a plan is for, and of the plan itself."""

from dataclasses import dataclass, fields

from configs.program.checks import between, not_negative, positive, share
from configs.program.errors import UserError

HERE = "this"
"""The GPU of a cluster that is what is found here."""


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """What `task=plan` plans for. A real run takes what it finds; nothing here changes it."""

    gpu: str = HERE
    """The GPU's name, for the page. `this` measures the machine that the plan is made on, in less than a minute."""
    known_as: str = ""
    """A pattern of the names that torch gives it, by which a run finds its GPU in the catalogue."""
    gpus: int = 1
    """GPUs of a node, a process for each. For `this`, the processes that were launched count, or
    `hardware.processes`."""
    nodes: int = 1
    """Nodes."""
    memory: float = 0.0
    """GB (10⁹ bytes) of a GPU, as torch reports them; for `this`, 0 takes what is free."""
    peak: float = 0.0
    """TFLOP/s of dense products in bfloat16, by the data sheet."""
    peak_float32: float = 0.0
    """TFLOP/s of products in float32."""
    bandwidth: float = 0.0
    """GB/s of a GPU's memory, by the data sheet."""
    grouped: bool = False
    """Whether torch has a kernel for the grouped product of all experts on it (Hopper and data-centre Blackwell)."""
    link: float = 0.0
    """GB/s that a GPU sends to the others of its node, one way."""
    network: float = 50.0
    """GB/s that a node sends to the others, one way, over all its adapters."""
    host_link: float = 25.0
    """GB/s between a GPU and the memory of its node, one way."""
    host_memory: float = 0.0
    """GB of a node's own memory."""
    disk: float = 2.0
    """GB/s at which a node reads the base."""
    price: float = 0.0
    """US dollars per GPU-hour."""
    product_share: float = 0.6
    """The share of the peak that matrix products are assumed to reach."""
    memory_share: float = 0.7
    """The share of the bandwidth that passes over the memory are assumed to reach."""
    link_share: float = 0.75
    """The share of link and network that collectives are assumed to reach."""
    reserve: float = 4.0
    """GB of a GPU that tensors are assumed not to get: CUDA's, NCCL's and cuBLAS's own, and gaps between tensors."""

    def check(self) -> None:
        for name in ("gpus", "nodes", "network", "host_link", "disk"):
            positive(f"cluster.{name}", getattr(self, name), f"cluster.{name}={getattr(ClusterConfig(), name):g}")
        for name in ("memory", "peak", "peak_float32", "bandwidth", "link", "host_memory", "price", "reserve"):
            not_negative(f"cluster.{name}", getattr(self, name))
        for name in ("product_share", "memory_share", "link_share"):
            between(f"cluster.{name}", getattr(self, name), 0.01, 1, "it is a share; give a number from 0.01 to 1")
        if self.gpu != HERE:
            given = {item.name: getattr(self, item.name) for item in fields(self)}
            for name in ("memory", "peak", "peak_float32", "bandwidth", "host_memory"):
                if not given[name]:
                    raise UserError(
                        f"cluster.gpu={self.gpu}: cluster.{name} is missing; give it, or choose a cluster of the "
                        f"catalogue, such as cluster=h100_8"
                    )
            if self.gpus > 1 and not self.link:
                raise UserError(f"cluster.link=0: {self.gpus} GPUs of a node need one; give its GB/s, one way")


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What a plan assumes, and where it is written."""

    check: bool = True
    """Before a real run loads anything, whether its planned peak is compared with the memory that is free."""
    json: str | None = None
    """For `task=plan`: a file that the plan is also written to, as JSON."""
    row_length: int = 4096
    """For `task=plan` without a prepared dataset: tokens of a row."""
    conversations: int = 0
    """The same: conversations of an epoch; 0 plans a step alone."""
    conversation_length: int = 400
    """The same: tokens of a conversation, on average."""
    supervised: float = 0.6
    """The same: the share of the tokens that is trained."""

    def check_values(self) -> None:
        """Raises `UserError` for values that can't be used."""
        positive("plan.row_length", self.row_length, "plan.row_length=4096")
        positive("plan.conversation_length", self.conversation_length, "plan.conversation_length=400")
        not_negative("plan.conversations", self.conversations)
        share("plan.supervised", self.supervised)
