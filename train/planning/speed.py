"""The seconds of a step, part by part: what is computed, moved and sent, at the rates of the machine.

Shapes: T tokens of a micro-batch, k experts per token, P = T·k token-expert pairs, H hidden, I intermediate, E experts,
V pieces of the vocabulary, n elements that train.
"""

from dataclasses import dataclass

from train.config.train import BatchArithmetic, TrainConfig
from train.planning.gathers import gathers
from train.planning.given.machine import Machine
from train.planning.given.rows import Rows
from train.planning.given.sizes import Sizes

PASSES_FORWARD, PASSES_BACKWARD = 14, 18
"""Times that a layer reads or writes something as large as its stream of tokens, beside products and experts: norms,
rotary embedding and additions. They make the sums that `scripts/benchmark.py traffic` traces."""
KERNELS = 140
"""Operations of a layer's forward and backward, by the same trace."""
BYTES_OF_SLOT = 2
"""Of a row on the disk: a token's id; the rest of a row is small."""
ADAM_ON_HOST = 30e9
"""Bytes per second at which a node's processor is assumed to update offloaded optimizer state."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds."""

    parts: dict[str, float]
    """Of a step, what is waited for: their sum is the step."""
    hidden: dict[str, float]
    """Of a step, what happens while something else is computed."""
    bound: str
    """What holds the step up: `arithmetic`, `memory`, `link inside the node`, `network between nodes`, `host link` or
    `launching operations`."""
    tokens: float
    """Of a step, without padding."""

    @property
    def step(self) -> float:
        """Of a step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all processes."""
        return self.tokens / self.step


@dataclass(slots=True)
class _Work:
    """Operations of products, the bytes that these move, and the bytes of all else."""

    flops: float = 0.0
    moved: float = 0.0
    passed: float = 0.0

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / machine.flops, self.moved / machine.bandwidth) + self.passed / machine.bandwidth


def speed(config: TrainConfig, sizes: Sizes, rows: Rows, batch: BatchArithmetic, machine: Machine) -> Speed:
    """Of a step of the run."""
    tokens = rows.length * batch.micro_batch
    layers = sizes.config.num_hidden_layers
    forward, attention = _forward(sizes, rows, tokens, machine), _attention(sizes, rows, tokens)
    backward, head = _backward(sizes, rows, tokens, machine), _head(sizes, rows, tokens)
    again = {"none": _Work(), "attention": attention, "full": forward}[config.activation_checkpointing]
    slow = _slowness(sizes, rows, machine)
    in_all = {
        "forward": layers * forward.seconds(machine) * slow["forward"],
        "recomputed": layers * again.seconds(machine) * slow["forward"],
        "backward": layers * backward.seconds(machine) * slow["backward"],
        "head": head.seconds(machine) * slow["head"],
    }
    if machine.layer:
        in_all["embedding and losses"] = machine.layer["around"] * tokens / machine.layer["tokens"]
    computed = sum(in_all.values())
    launched = (KERNELS * (1.3 if config.activation_checkpointing == "full" else 1)) * layers * machine.overhead
    launched *= not machine.layer  # it is in what was measured
    exposed, hidden, inside, outside, by_host = _gathers(config, sizes, batch, machine, computed)
    parts = {name: batch.accumulation * seconds for name, seconds in in_all.items() if seconds}
    if launched > computed:
        parts["launching"] = batch.accumulation * (launched - computed)
    if exposed:
        parts["gathers"] = batch.accumulation * exposed
    parts |= {name: value for name, value in _once(config, sizes, batch, machine).items() if value}
    if beside := _beside_computing(config, layers, batch, machine):
        parts["DeepSpeed's own"] = beside
    parts["reading rows"] = batch.accumulation * tokens * BYTES_OF_SLOT / machine.disk
    each = (forward, again, backward)
    arithmetic = layers * sum(work.flops for work in each) / machine.flops + head.flops / machine.flops
    bounds = {
        "arithmetic": arithmetic,
        "memory": computed - arithmetic,
        "link inside the node": inside if exposed > computed / 2 else 0.0,
        "network between nodes": outside if exposed > computed / 2 else 0.0,
        "host link": by_host if exposed > computed / 2 else 0.0,
        "launching operations": max(launched - computed, beside / batch.accumulation),
    }
    return Speed(
        parts=parts,
        hidden={"gathers": batch.accumulation * hidden} if hidden else {},
        bound=max(bounds, key=bounds.__getitem__),
        tokens=rows.tokens * batch.rows,
    )


def _forward(sizes: Sizes, rows: Rows, tokens: int, machine: Machine) -> _Work:
    """Of a layer."""
    config, b = sizes.config, sizes.itemsize
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    P, weights = tokens * config.num_experts_per_tok, 3 * config.num_local_experts * H * I * b
    work = _attention(sizes, rows, tokens)
    work.flops += 2 * P * 3 * H * I + _factors(sizes, tokens, machine)
    work.moved += weights + P * (2 * H + 3 * I) * b
    work.passed = _passed(sizes, tokens, PASSES_FORWARD, 3) + _beside(sizes, tokens)
    return work


def _backward(sizes: Sizes, rows: Rows, tokens: int, machine: Machine) -> _Work:
    """Of a layer, nothing computed again."""
    forward, scores = _forward(sizes, rows, tokens, machine), _scores(sizes, rows, tokens)
    times = 2 if sizes.trains_all else 1
    # The input's gradient takes as much as the forward, that of what trains as much again; scores have four products.
    return _Work(
        flops=times * (forward.flops - scores) + 2 * scores + _factors(sizes, tokens, machine),
        moved=times * forward.moved,
        passed=_passed(sizes, tokens, PASSES_BACKWARD, 6) + 1.5 * _beside(sizes, tokens),
    )


def _head(sizes: Sizes, rows: Rows, tokens: int) -> _Work:
    """With the loss, forward and backward."""
    logits = tokens * rows.supervised * sizes.config.vocab_size
    times = 6 if sizes.trains_all else 4
    return _Work(flops=times * logits * sizes.config.hidden_size, passed=4 * 4 * logits)


def _slowness(sizes: Sizes, rows: Rows, machine: Machine) -> dict[str, float]:
    """How many times as long as the arithmetic says a layer and the head took; 1 if they weren't measured."""
    if not machine.layer:
        return dict.fromkeys(("forward", "backward", "head"), 1.0)
    tokens = round(machine.layer["tokens"])
    works = {
        "forward": _forward(sizes, rows, tokens, machine),
        "backward": _backward(sizes, rows, tokens, machine),
        "head": _head(sizes, rows, tokens),
    }
    return {name: machine.layer[name] / work.seconds(machine) for name, work in works.items()}


def _attention(sizes: Sizes, rows: Rows, tokens: int) -> _Work:
    """Of a layer, up to its experts."""
    config, b = sizes.config, sizes.itemsize
    H, wide = config.hidden_size, config.num_attention_heads * sizes.head_width
    weights = 2 * H * wide + 2 * H * config.num_key_value_heads * sizes.head_width
    return _Work(
        flops=2 * tokens * weights + _scores(sizes, rows, tokens),
        moved=weights * b + 6 * tokens * H * b,
        passed=tokens * H * b * PASSES_FORWARD * 0.8,
    )


def _scores(sizes: Sizes, rows: Rows, tokens: int) -> float:
    """Operations of a layer's scores and of the sums by them, forward: each token sees half of its conversation."""
    return 2 * 2 * tokens * rows.conversation / 2 * sizes.config.num_attention_heads * sizes.head_width


def _factors(sizes: Sizes, tokens: int, machine: Machine) -> float:
    """Operations of a layer's adapters, forward. Grouped, all rows meet all factors."""
    config = sizes.config
    H, I, E = config.hidden_size, config.intermediate_size, config.num_local_experts  # noqa: E741
    P = tokens * config.num_experts_per_tok
    low = sizes.expert_ranks if machine.grouped else sizes.expert_ranks / E
    keys = config.num_key_value_heads * sizes.head_width
    return 2 * P * low * (2 * H + 3 * I) + 2 * tokens * sizes.attention_rank * (6 * H + 2 * keys)


def _passed(sizes: Sizes, tokens: int, passes: int, times: int) -> float:
    """Bytes moved beside products: of the stream, and of the experts' activation `times` over."""
    config, P = sizes.config, tokens * sizes.config.num_experts_per_tok
    of_experts = times * P * (config.intermediate_size + config.hidden_size)
    return (passes * tokens * config.hidden_size + of_experts) * sizes.itemsize


def _beside(sizes: Sizes, tokens: int) -> float:
    """Bytes that a layer's adapters and a quantised base move beside the products with the base, forward."""
    config, b = sizes.config, sizes.itemsize
    P, H, I = tokens * config.num_experts_per_tok, config.hidden_size, config.intermediate_size  # noqa: E741
    adapters = P * (3 * H + 5 * I) * b if sizes.expert_ranks else 0
    dequantised = 3 * config.num_local_experts * H * I * (b + 0.5625) if sizes.quantised else 0
    return adapters + dequantised


def _gathers(
    config: TrainConfig, sizes: Sizes, batch: BatchArithmetic, machine: Machine, computed: float
) -> tuple[float, float, float, float, float]:
    """Of a micro-step: what is waited for, what is hidden, and what link, network and host link take in all."""
    offloaded = config.deepspeed.offload_param == "cpu" and machine.on_cuda
    linked = batch.processes > 1 and machine.link > 0
    if config.deepspeed.stage != 3 or not (linked or offloaded):
        return 0.0, 0.0, 0.0, 0.0, 0.0
    found = gathers(sizes, config.deepspeed, config.activation_checkpointing)
    received = found.forward + found.backward
    inside = received * (batch.processes - 1) / batch.processes / machine.link if linked else 0.0
    apart = machine.nodes > 1 and not config.deepspeed.node_copy
    # NCCL's rings bring each process all parts but its own, so all but one of them into each node.
    outside = received * (batch.processes - 1) / batch.processes / machine.network if apart else 0.0
    by_host = received / batch.processes / machine.host_link if offloaded else 0.0
    took = max(inside, outside, by_host)
    if not machine.on_cuda:
        return took, 0.0, inside, outside, by_host
    # The first block of the forward and of the backward have nothing to hide under. Fetching ahead takes room for two.
    ends = 2 * found.largest / received * took
    largest = max(sum(tensor.elements for tensor in unit.tensors) for unit in sizes.units)
    share = 1.0 if config.deepspeed.max_live_parameters >= 2 * largest else 0.5
    exposed = min(took, max(took - share * computed, ends))
    return exposed, took - exposed, inside, outside, by_host


def _beside_computing(config: TrainConfig, layers: int, batch: BatchArithmetic, machine: Machine) -> float:
    """What a step takes however little there is to compute and to send; 0 if that wasn't measured."""
    found = machine.beside.get(str(config.deepspeed.stage))
    if found is None:
        return 0.0
    micro_step, update = (found[name] + layers * found[f"{name} of a layer"] for name in ("micro-step", "update"))
    return batch.accumulation * micro_step + update


def _once(config: TrainConfig, sizes: Sizes, batch: BatchArithmetic, machine: Machine) -> dict[str, float]:
    """What does not overlap with computing: reductions, the update, what an offloaded optimizer sends."""
    n, processes, stage = sizes.trained, batch.processes, config.deepspeed.stage
    reduced = 0.0
    if processes > 1 and machine.link:
        share = (processes - 1) / processes
        times = 1 if stage == 0 else batch.accumulation
        size = 2 * n * 4 if stage == 0 else n * sizes.itemsize
        reduced = times * size * share / min(machine.link, machine.network if machine.nodes > 1 else machine.link)
        if stage == 2:  # and the updated parameters go back to everyone
            reduced += n * sizes.itemsize * share / machine.link
    shards = processes if stage > 0 else 1
    state = 28.0 * n / shards  # master, moments and gradient read, master, moments and parameter written
    if config.deepspeed.offload_optimizer == "cpu" and machine.on_cuda:
        of_node = processes / machine.nodes
        sent = n / shards * (4 + sizes.itemsize) / machine.host_link
        return {"reductions": reduced, "offload": sent, "update": state * of_node / ADAM_ON_HOST}
    return {"reductions": reduced, "update": state / machine.bandwidth}
