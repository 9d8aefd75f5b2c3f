"""Every YAML composes to the settings of its program, says what comes out, and passes the checks."""

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from configs.program import entry
from configs.program.entry import CONFIG_DIR
from data.config import PrepareConfig
from inference.config import InferenceConfig
from train.config.train import TrainConfig

SCHEMAS = {"prepare": PrepareConfig, "train": TrainConfig, "inference": InferenceConfig}


def groups_of(program: str) -> set[str]:
    """The groups that a program's defaults list names."""
    listed = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{program}.yaml"))["defaults"]  # type: ignore[index,call-overload]
    return {group for item in listed if isinstance(item, dict) for group in item if not group.startswith("override ")}


def cases() -> list[Any]:
    """(file, program, override) for each YAML and each program that it belongs to."""
    found = []
    for path in sorted(CONFIG_DIR.rglob("*.yaml")):
        file = path.relative_to(CONFIG_DIR)
        if file.parent == Path():
            found.append(pytest.param(file, file.stem, [], id=str(file)))
            continue
        group = file.parent.as_posix()
        owners = [program for program in SCHEMAS if group in groups_of(program)]
        # A group that no program names would never be composed: let its test fail rather than leave it out.
        for program in owners or ["nobody"]:
            found.append(pytest.param(file, program, [f"{group}={file.stem}"], id=f"{program}:{file}"))
    return found


def composed(program: str, overrides: list[str]) -> Any:
    entry.register(program, SCHEMAS[program])
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(program, overrides)


@pytest.mark.parametrize(("file", "program", "overrides"), cases())
def test_yaml_composes_to_its_dataclass(file: Path, program: str, overrides: list[str]) -> None:
    config = OmegaConf.to_object(composed(program, overrides))
    assert type(config) is SCHEMAS[program]


@pytest.mark.parametrize(("file", "program", "overrides"), cases())
def test_what_a_yaml_says_is_what_comes_out(file: Path, program: str, overrides: list[str]) -> None:
    """A recipe is a diff: nothing that is composed after it may undo it."""
    path = CONFIG_DIR / file
    said = OmegaConf.load(path)
    is_global = "# @package _global_" in path.read_text(encoding="utf-8") or not overrides
    prefix = "" if is_global else f"{file.parent.as_posix().replace('/', '.')}."
    result = composed(program, overrides)

    for key in leaves(said):
        if key.split(".")[0] not in ("defaults", "hydra"):
            value = OmegaConf.select(result, prefix + key, throw_on_missing=True)
            assert value == OmegaConf.select(said, key), key


def leaves(node: Any, prefix: str = "") -> list[str]:
    names = []
    for key in node:
        child = node._get_node(key)
        names += leaves(child, f"{prefix}{key}.") if OmegaConf.is_dict(child) else [prefix + key]
    return names


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIG_DIR / "recipe").rglob("*.yaml")))
def test_recipe_passes_its_checks(recipe: str) -> None:
    config = OmegaConf.to_object(composed("train", [f"recipe={recipe}"]))
    assert isinstance(config, TrainConfig)
    config.check()
    assert config.batch(config.hardware.processes).rows == config.global_batch


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIG_DIR / "data").rglob("*.yaml")))
def test_data_choice_passes_its_checks(choice: str) -> None:
    config = OmegaConf.to_object(composed("prepare", [f"data={choice}"]))
    assert isinstance(config, PrepareConfig)
    config.check()


def test_every_program_has_a_yaml() -> None:
    assert {path.stem for path in CONFIG_DIR.glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize("schema", SCHEMAS.values())
def test_config_has_a_default_for_everything(schema: type) -> None:
    assert is_dataclass(schema)
    assert asdict(schema())  # type: ignore[call-overload]


def test_recipes_override_groups_before_they_speak() -> None:
    """The recipe's own values win over the group it chooses: quickstart's rank is not the group's."""
    config = composed("train", ["recipe=quickstart", "lora.rank=3"])
    assert config.lora.rank == 3  # the command line has the last word
    assert composed("train", ["recipe=quickstart"]).model.path == "runs/quickstart-base/model"
    assert composed("train", []).model.path is None


def test_the_recipe_for_one_gpu_is_the_full_one_but_for_a_few_settings() -> None:
    full, one = (composed("train", [f"recipe=openhermes_mixtral_8x7b{of}"]) for of in ("", "_one_gpu"))
    changed = {key for key in leaves(full) if OmegaConf.select(full, key) != OmegaConf.select(one, key)}
    shape = {"model.weights", "deepspeed.offload_param", "deepspeed.offload_optimizer", "hardware.processes"}
    assert changed == {"name", *shape}
