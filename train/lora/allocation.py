"""Which experts get an adapter, and of which rank: as the settings say, or from a measured load."""

from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from configs.program.errors import UserError
from data.disk.formats import sizes
from data.disk.formats.json_text import parse_json
from data.disk.formats.regular import UnreadableError, read_regular
from train.config.lora import LoraConfig

STEP = 8
"""Ranks in proportion to load are multiples of this: rows of whole 16 bytes, which grouped products ask for."""


class Load(TypedDict):
    """What is read of an expert_load.json."""

    tokens_per_expert: list[list[Annotated[int, Meta(ge=0)]]]


def expert_ranks(config: LoraConfig, layers: int, experts: int, parameters_per_rank: int) -> list[list[int]]:
    """The LoRA rank of each expert of each layer; 0 if it gets no adapter.

    Args:
        config: the settings.
        layers: of the model.
        experts: of a layer.
        parameters_per_rank: what one rank on one expert costs in trained parameters.

    Raises:
        UserError: the model has no such experts, the load is not this model's, or the budget buys nothing.
    """
    if config.experts == "by_load":
        return _by_load(config, layers, experts, parameters_per_rank)
    of_layer = config.expert_ranks or [config.rank] * experts
    if len(of_layer) != experts:
        raise UserError(
            f"lora.expert_ranks={of_layer}: the model has {experts} experts a layer; give one rank for each"
        )
    if config.experts != "all":
        if unknown := set(config.experts) - set(range(experts)):
            raise UserError(
                f"lora.experts={config.experts}: there is no expert {min(unknown)}; give 0 to {experts - 1}"
            )
        of_layer = [rank if expert in config.experts else 0 for expert, rank in enumerate(of_layer)]
    return [of_layer] * layers


def _by_load(config: LoraConfig, layers: int, experts: int, parameters_per_rank: int) -> list[list[int]]:
    assert config.load is not None
    load = read_load(Path(config.load))
    if len(load) != layers or any(len(of_layer) != experts for of_layer in load):
        raise UserError(
            f"lora.load={config.load}: it was measured on {len(load)} layers of {len(load[0])} experts, the model has "
            f"{layers} of {experts}; profile this model"
        )
    step = STEP if config.by_load == "ranks" else config.rank
    portions = config.budget // (step * parameters_per_rank) if parameters_per_rank else 0
    if not portions:
        cost = step * parameters_per_rank
        raise UserError(
            f"lora.budget={config.budget}: rank {step} on one expert takes {cost:,} parameters; give at least that many"
        )
    share = {
        (layer, expert): load[layer][expert] / sum(load[layer]) for layer in range(layers) for expert in range(experts)
    }
    ranks = [[0] * experts for _ in range(layers)]
    if config.by_load == "experts":
        for layer, expert in sorted(share, key=lambda which: -share[which])[:portions]:
            ranks[layer][expert] = config.rank
        return ranks
    # Whole portions in proportion, then what is left by the largest remainders.
    total = sum(share.values())
    exact = {which: portions * part / total for which, part in share.items()}
    given = {which: int(number) for which, number in exact.items()}
    left = portions - sum(given.values())
    for which in sorted(share, key=lambda which: given[which] - exact[which])[:left]:
        given[which] += 1
    for (layer, expert), number in given.items():
        ranks[layer][expert] = number * step
    return ranks


def read_load(path: Path) -> list[list[int]]:
    """Tokens of each expert of each layer, from an expert_load.json.

    Raises:
        UserError: the file is not one.
    """
    remedy = "`python -m train task=profile` writes one"
    try:
        content = read_regular(path, sizes.SETTINGS, linked=True)
    except UnreadableError as error:
        raise UserError(f"lora.load={path}: it can't be read ({error}); {remedy}") from error
    try:
        tokens = parse_json(content, Load)["tokens_per_expert"]
        if not tokens or not all(sum(of_layer) for of_layer in tokens):
            raise UnreadableError("a layer has no tokens")
        if len({len(of_layer) for of_layer in tokens}) > 1:
            raise UnreadableError("its layers have different numbers of experts")
    except UnreadableError as error:
        raise UserError(f"lora.load={path}: it is not a measured load ({error}); {remedy}") from error
    return tokens
