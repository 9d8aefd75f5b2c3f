"""Settings of the base model."""

from dataclasses import dataclass, field, fields

from configs.program.checks import choice, positive
from configs.program.errors import UserError

VOCABULARY = 32_000
"""Pieces of the Mixtral vocabulary, in which datasets are prepared."""


@dataclass(kw_only=True, slots=True)
class ArchitectureConfig:
    """The sizes of a Mixtral; the defaults are those of Mixtral-8x7B's config.json."""

    vocab_size: int = VOCABULARY
    """Pieces of the vocabulary."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    intermediate_size: int = 14336
    """Inner width of each expert."""
    num_hidden_layers: int = 32
    """Layers."""
    num_attention_heads: int = 32
    """Query heads of a layer."""
    num_key_value_heads: int = 8
    """Key and value heads of a layer; they divide the query heads into groups."""
    num_local_experts: int = 8
    """Experts of a layer."""
    num_experts_per_tok: int = 2
    """Experts that the router chooses for a token."""
    max_position_embeddings: int = 32768
    """Longest conversation, in tokens."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary embedding's wavelengths."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""

    def check(self) -> None:
        for item in fields(self):
            positive(f"model.architecture.{item.name}", getattr(self, item.name), f"{item.name}={item.default}")
        for name, divisor in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            if getattr(self, name) % getattr(self, divisor):
                raise UserError(
                    f"model.architecture.{name}={getattr(self, name)}: it is not a multiple of {divisor} "
                    f"{getattr(self, divisor)}; change one of the two"
                )
        if self.num_experts_per_tok > self.num_local_experts:
            raise UserError(
                f"model.architecture.num_experts_per_tok={self.num_experts_per_tok}: there are only "
                f"{self.num_local_experts} experts; give at most as many"
            )
        if self.vocab_size < VOCABULARY:
            raise UserError(
                f"model.architecture.vocab_size={self.vocab_size}: prepared rows hold ids up to {VOCABULARY - 1}; "
                f"give {VOCABULARY}"
            )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The base model: weights at `path`, or random ones of the given architecture."""

    path: str | None = None
    """A model directory or a hub id. Unset, the base starts random from `architecture`."""
    revision: str | None = None
    """The commit, tag or branch of a hub id."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """The sizes of a random base. If `path` names weights, theirs count."""
    dtype: str = "bfloat16"
    """`bfloat16` or `float32`: weights, activations and gradients. ZeRO keeps float32 masters either way."""
    weights: str = "bf16"
    """How the frozen base is held: `bf16` as `dtype` says; `nf4` has attention and experts in four bits, 0.29 of the
    bytes, and computes in `dtype`. For adapters, and with the extra `nf4` installed."""
    attention: str = "packed"
    """`packed` computes what conversations can see and no more: torch's variable-length flash attention on CUDA, blocks
    of queries elsewhere. Or one of transformers' own: `flash_attention_2`, `sdpa`, `eager`."""

    def check(self) -> None:
        choice("model.dtype", self.dtype, "bfloat16", "float32")
        choice("model.weights", self.weights, "bf16", "nf4")
        choice("model.attention", self.attention, "packed", "flash_attention_2", "sdpa", "eager")
        if self.path is None:
            self.architecture.check()
