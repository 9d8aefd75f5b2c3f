"""The memory of a process, part by part, by arithmetic over the sizes of what training allocates.

Shapes: T tokens of a micro-batch, k experts per token, P = T·k token-expert pairs, H hidden, I intermediate, E experts,
V pieces of the vocabulary, n elements that train.
"""

from dataclasses import dataclass, field

from train.config.train import TrainConfig
from train.lora.products import ROW_MULTIPLE
from train.model.attention import QUERIES
from train.model.head import CHUNK, CHUNK_ON_GPU
from train.planning.gathers import gathers, persists
from train.planning.given.machine import Machine
from train.planning.given.sizes import Sizes, Tensor

WIDE = 4
"""Bytes of a sum: masters, moments, gradients and softmax are in float32."""
PINNED = 4 / 3
"""What pinned memory takes: a power of two for each tensor, on average a third more."""

GAPS, GAPS_IN_HALF, GAPS_OF_MATRICES = 1.8, 6.0, 9.0
"""Holes in a CPU's heap: in float32 and in bfloat16, as multiples of what a layer's forward makes, and of the
dequantised matrix if there is one. Experts get other numbers of rows in each step, so a new tensor seldom fits where
an old one was. Fitted, with the next, to the peaks of 28 runs of 0.7 to 8.5 GB; no arithmetic gives them."""
CODE_IN_HALF = 0.12e9
"""Bytes of the code that oneDNN makes for bfloat16, other code for each number of rows."""
LEFT_TO_THE_KERNEL = 16 << 20
"""Bytes from which on what is freed leaves no hole (train/engine/cpu.py)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    parts: dict[str, float]
    """What a process holds at its peak, on its device."""
    where: str
    """Where in the step the peak is."""
    host: float
    """What all processes of a node hold in its own memory, for GPUs: loading, offloading, the programs."""
    phases: dict[str, float] = field(default_factory=dict)
    """The highest of each phase."""

    @property
    def peak(self) -> float:
        """Of a process, on its device."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch."""

    kept: float
    """By a layer, from the forward to its backward."""
    kept_when_computed: float
    """By a layer while its own backward runs, what is computed again included."""
    forward: float
    """Beyond `kept_when_computed`, the largest temporaries of a layer's forward."""
    backward: float
    """Beyond `kept_when_computed`, the largest temporaries of a layer's backward."""
    head: float
    """Logits of a chunk and what goes with them."""
    shared: float
    """What is there once for all layers: the stream that enters them, rotary embedding, the routers' logits."""


def activations(sizes: Sizes, tokens: int, checkpointing: str, machine: Machine) -> Activations:
    """Of a micro-batch of that many tokens, all of them supervised."""
    config, b = sizes.config, sizes.itemsize
    H, I, k, E = config.hidden_size, config.intermediate_size, config.num_experts_per_tok, config.num_local_experts  # noqa: E741
    D, heads, keys = sizes.head_width, config.num_attention_heads, config.num_key_value_heads
    filling = E * (ROW_MULTIPLE - 1) if not machine.on_cuda and b == 2 else 0
    P = tokens * k + filling
    rank = max(1, sizes.expert_ranks // E) if sizes.expert_ranks else 0
    stream = tokens * H * b
    attended = tokens * heads * D * b
    # the norms keep their input and a number a row; the projections' adapters, or they themselves, keep theirs
    normed = stream if sizes.attention_rank or sizes.trains_all else 0
    small = tokens * (2 * WIDE + 4 * sizes.attention_rank * b)
    of_attention = stream + normed + attended + 2 * tokens * keys * D * b + small
    of_attention += attended if sizes.attention_rank or machine.on_cuda or sizes.trains_all else 0
    of_attention += tokens * heads * WIDE if machine.on_cuda else 0
    residual = stream
    width_low = rank * E if machine.grouped else rank
    of_experts = stream + P * (2 * I + H + 2 * width_low) * b + 3 * P * 8 + 4 * tokens * E * WIDE
    everything = of_attention + residual + of_experts
    kept = {"none": everything, "attention": stream + of_experts, "full": stream}[checkpointing]
    computed = everything if checkpointing == "full" else of_attention + residual if checkpointing == "attention" else 0

    rows = P if machine.grouped else -(-P // E)
    dequantised = 2 * I * H * b * (E if machine.grouped else 1) if sizes.quantised else 0
    of_factors = sizes.expert_ranks * (2 * H + 3 * I) * b
    of_weights = 3 * E * H * I * b if sizes.trains_all else 0
    # weighted sums widen a token's rows: two of them at a time, and their sum
    forward = rows * (H + I) * b + tokens * H * (b + 2 * WIDE if not machine.on_cuda else b) + dequantised
    backward = (
        P * (2 * H + I) * b
        + rows * (2 * I + H + (I if not machine.on_cuda else 0)) * b
        + (2 * tokens * H * WIDE if not machine.on_cuda else 0)
        + 3 * stream
        + of_factors
        + of_weights
        + dequantised
    )
    chunk = CHUNK_ON_GPU if machine.on_cuda else CHUNK
    V = config.vocab_size
    logits = chunk * V * (b + (2 if machine.on_cuda else 1) * WIDE)
    head = logits + 2 * stream + (V * H * WIDE if sizes.trains_all else 0)
    blocks = heads * QUERIES * min(tokens, 4096) * (2 * WIDE + b) if not machine.on_cuda else 0
    routers = 6 * config.num_hidden_layers * tokens * k * E * 8
    return Activations(
        kept=kept,
        kept_when_computed=computed,
        forward=max(forward, blocks),
        backward=max(backward, blocks + 3 * tokens * heads * D * WIDE),
        head=head,
        shared=2 * stream + 2 * tokens * D * WIDE + routers,
    )


def memory(config: TrainConfig, sizes: Sizes, tokens: int, processes: int, machine: Machine) -> Memory:
    """Of a run with micro-batches of that many tokens.

    Args:
        config: of the run; its stage, offloading and thresholds count.
        sizes: of base and adapters.
        tokens: of a micro-batch.
        processes: of the run.
        machine: what it runs on.
    """
    zero, b, n = config.deepspeed, sizes.itemsize, sizes.trained
    stage = zero.stage
    shards = processes if stage > 0 else 1
    to_host = {"base": zero.offload_param == "cpu", "optimizer": zero.offload_optimizer == "cpu"}
    frozen = [tensor for tensor in sizes.tensors if not tensor.trained]
    trained = [tensor for tensor in sizes.tensors if tensor.trained]

    def held(tensors: list[Tensor]) -> tuple[float, float]:
        """What is always there of parameters, on the device and as shards that may lie in the host's memory."""
        whole = float(sum(tensor.bytes for tensor in tensors))
        if stage < 3 or processes == 1:
            return (0.0, whole) if stage == 3 else (whole, 0.0)
        return float(sum(t.bytes for t in tensors if persists(t, zero))), whole / processes

    (base, base_shards), (adapters, adapter_shards) = held(frozen), held(trained)
    optimizer = {
        "masters": n * WIDE / shards if b < WIDE or stage > 0 else 0.0,
        "moments": 2 * n * WIDE / shards,
    }
    gradients = n * WIDE / shards
    bucket = min(zero.bucket_size, max(n, 1)) * b if not machine.on_cuda else zero.bucket_size * b
    parts: dict[str, float] = {
        "base": base + base_shards,
        "adapters": adapters + adapter_shards,
        **optimizer,
        "gradients": gradients,
        "buckets": float(bucket) if stage > 1 and processes > 1 else 0.0,
    }
    if stage == 3 and zero.node_copy and machine.nodes > 1:
        parts["copy of the node"] = base_shards * processes / (processes // machine.nodes)
    host = 0.0
    if machine.on_cuda:
        of_node = processes / machine.nodes
        if to_host["base"]:
            parts["base"], parts["adapters"] = base, adapters
            host += of_node * PINNED * (base_shards + adapter_shards)
        if to_host["optimizer"]:
            for name in optimizer:
                host += of_node * parts[name]
                parts[name] = 0.0
        host += _loading(config, sizes, of_node)
    # One process alone has views of its shards, unless they come from the host's memory.
    makes_whole = stage == 3 and (processes > 1 or (machine.on_cuda and to_host["base"]))
    live = gathers(sizes, zero, config.activation_checkpointing) if makes_whole else None
    of_batch = activations(sizes, tokens, config.activation_checkpointing, machine)
    layers = sizes.config.num_hidden_layers
    kept, gathered = layers * of_batch.kept, float(live.held) if live else 0.0
    if not machine.on_cuda:
        parts["gaps of the heap"] = _gaps(sizes, tokens, machine)
    phases = {
        "backward of the last layer": {
            "gathered": gathered,
            "activations kept": kept + of_batch.shared,
            "largest temporary": of_batch.kept_when_computed + of_batch.backward,
        },
        "head": {"gathered": gathered, "activations kept": kept + of_batch.shared, "head": of_batch.head},
        "forward of the last layer": {
            "gathered": gathered,
            "activations kept": kept + of_batch.shared,
            "largest temporary": of_batch.forward
            + (of_batch.kept_when_computed if config.activation_checkpointing != "none" else 0),
        },
        "update": {"largest temporary": 2 * n * WIDE / shards},
    }
    where = max(phases, key=lambda name: sum(phases[name].values()))
    always = sum(parts.values())
    parts |= phases[where]
    parts["runtime"] = machine.runtime
    of_phases = {name: always + machine.runtime + sum(phase.values()) for name, phase in phases.items()}
    return Memory({name: size for name, size in parts.items() if size}, where, host, of_phases)


def _gaps(sizes: Sizes, tokens: int, machine: Machine) -> float:
    """What a CPU process holds beside tensors because of them."""
    made = activations(sizes, tokens, "none", machine).kept
    if sizes.itemsize != 2:
        return GAPS * made
    matrix = 2 * sizes.config.intermediate_size * sizes.config.hidden_size * sizes.itemsize
    in_heap = sizes.quantised and matrix < LEFT_TO_THE_KERNEL
    return CODE_IN_HALF + GAPS_IN_HALF * made + (GAPS_OF_MATRICES * matrix if in_heap else 0.0)


def _loading(config: TrainConfig, sizes: Sizes, of_node: float) -> float:
    """What the processes of a node hold in its memory while the base is loaded, beyond the kernel's cache of files."""
    largest = max(tensor.bytes for tensor in sizes.tensors)
    return 2.0 * largest + of_node * 2e9
