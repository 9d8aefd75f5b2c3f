"""Settings of the adapters."""

from dataclasses import dataclass, field
from typing import Any

from configs.program.checks import BELOW_1, between, choice, positive
from configs.program.errors import UserError

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linear layers of Mixtral's attention."""
EXPERT_TARGETS = ("gate_up_proj", "down_proj")
"""The expert parameters: [E, 2I, H] (gate and up in one) and [E, H, I]."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Which parameters train: adapters, or everything."""

    method: str = "lora"
    """`lora`, or `none` to train every parameter of the base."""
    rank: int = 16
    """The LoRA rank, the inner size of every adapter that is given no other."""
    alpha: int = 32
    """The adapters' output is scaled by alpha / rank, each expert's by its own rank."""
    rank_stabilised: bool = False
    """Scales by alpha / √rank instead."""
    dropout: float = 0.0
    """Probability with which an adapter's input is dropped; on experts drawn for each token-expert pair."""
    attention: list[str] = field(default_factory=lambda: list(ATTENTION_TARGETS))
    """Attention projections with an adapter."""
    projections: list[str] = field(default_factory=lambda: list(EXPERT_TARGETS))
    """Expert projections with an adapter: `gate_up_proj` (gate and up in one) and `down_proj`."""
    router: str = "frozen"
    """`frozen`, or `trained` to train the routers' own weights."""
    experts: Any = "all"
    """The experts with an adapter: `all`, a list of numbers such as [0,3] (of every layer), or `by_load`: what `budget`
    and the measured load say."""
    expert_ranks: list[int] = field(default_factory=list)
    """A LoRA rank for each expert (0 for none) in place of `rank`, the same in every layer."""
    load: str | None = None
    """For `experts=by_load`: the expert_load.json that `task=profile` wrote."""
    budget: int = 0
    """For `experts=by_load`: trained parameters that the experts' adapters may have, over all layers."""
    by_load: str = "ranks"
    """For `experts=by_load`: `ranks` gives each expert a rank in proportion to its load, `experts` gives the most
    loaded ones `rank`."""
    start: str | None = None
    """An adapter directory of the same shape whose numbers the run starts from, instead of fresh ones."""
    export_per_expert: bool = True
    """Also writes adapter/per_expert/ if experts have adapters: a key for each expert's w1, w2 and w3, as vLLM and
    transformers 4 name them."""

    def check(self) -> None:
        choice("lora.method", self.method, "lora", "none")
        positive("lora.rank", self.rank, "lora.rank=16")
        positive("lora.alpha", self.alpha, "lora.alpha=32")
        wanted = "it is a probability; give a number from 0 to below 1"
        between("lora.dropout", self.dropout, 0, BELOW_1, wanted)
        for name, known in (("attention", ATTENTION_TARGETS), ("projections", EXPERT_TARGETS)):
            targets = getattr(self, name)
            for target in targets:
                choice(f"lora.{name}", target, *known)
                if targets.count(target) > 1:
                    raise UserError(f"lora.{name}={targets}: {target} is named twice; name it once")
        choice("lora.router", self.router, "frozen", "trained")
        choice("lora.by_load", self.by_load, "ranks", "experts")
        self._check_experts()
        if self.method == "lora" and not self.projections:
            self._check_without_experts()

    def _check_without_experts(self) -> None:
        if not self.attention:
            besides = "" if self.router == "frozen" else ", and a trained router is stored beside one"
            raise UserError(
                f"lora.attention=[]: with lora.projections=[] there would be no adapter{besides}; name a target in one "
                f"of them"
            )
        for name, default in (("experts", "all"), ("expert_ranks", [])):
            if (value := getattr(self, name)) != default:
                raise UserError(
                    f"lora.{name}={value}: with lora.projections=[] no expert has an adapter; leave it out, or name "
                    f"gate_up_proj, down_proj, or both"
                )

    def _check_experts(self) -> None:
        numbers = isinstance(self.experts, list) and all(type(expert) is int for expert in self.experts)
        if self.experts not in ("all", "by_load") and not numbers:
            raise UserError(
                f"lora.experts={self.experts}: there is no such choice; choose all, by_load, or numbers as in "
                f"'lora.experts=[0,3]' (what adapters sit on is lora.projections)"
            )
        if any(rank < 0 for rank in self.expert_ranks):
            raise UserError(f"lora.expert_ranks={self.expert_ranks}: a rank can't be negative; give 0 for no adapter")
        for name, is_empty in (
            ("experts", self.experts == []),
            ("expert_ranks", self.expert_ranks and not any(self.expert_ranks)),
        ):
            if is_empty:
                raise UserError(
                    f"lora.{name}={getattr(self, name)}: no expert would have an adapter; use lora=attention for that"
                )
        if numbers and self.expert_ranks:
            # experts that the model doesn't have are refused once the model is known
            known = [expert for expert in self.experts if 0 <= expert < len(self.expert_ranks)]
            if known and not any(self.expert_ranks[expert] for expert in known):
                raise UserError(
                    f"lora.expert_ranks={self.expert_ranks}: with lora.experts={self.experts} no expert would have an "
                    f"adapter; give one of those a rank above 0"
                )
        if self.experts == "by_load":
            if self.load is None:
                raise UserError(
                    "lora.load: experts=by_load needs a measured load; run `python -m train task=profile` and name the "
                    "expert_load.json that it writes"
                )
            positive("lora.budget", self.budget, "lora.budget=100000000 parameters with lora.experts=by_load")
            if self.expert_ranks:
                raise UserError(
                    f"lora.expert_ranks={self.expert_ranks}: with lora.experts=by_load the load decides; leave it out"
                )
            if not self.projections:
                raise UserError(
                    "lora.projections=[]: with lora.experts=by_load there is nothing to divide; name gate_up_proj, "
                    "down_proj, or both"
                )
        elif self.load is not None or self.budget:
            name = "load" if self.load is not None else "budget"
            raise UserError(
                f"lora.{name}={getattr(self, name)}: it takes effect with lora.experts=by_load alone; give that as well"
            )
