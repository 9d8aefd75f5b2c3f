"""Every command that the README prints composes: no setting in it is misspelled or gone."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from configs.program import multirun
from configs.program.entry import CONFIG_DIR, register
from data.config import PrepareConfig
from inference.config import InferenceConfig
from train.config.train import TrainConfig

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "data": ("prepare", PrepareConfig),
    "train": ("train", TrainConfig),
    "inference": ("inference", InferenceConfig),
}
COMMANDS = [
    line.strip()
    for name in ("README.md", "CONTRIBUTING.md")
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    if re.match(r"    (python -m|deepspeed|\./scripts|sbatch)", line)
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_composes(command: str) -> None:
    words = shlex.split(command, comments=True)
    script = next((word for word in words if "scripts/" in word), None)
    if script:
        assert (ROOT / script).is_file()
        if "launch" not in script:
            return
        module = "train"
    else:
        module = words[words.index("--module") + 1] if words[0] == "deepspeed" else words[2]
    config_name, schema = PROGRAMS[module]
    overrides = [word for word in words if "=" in word and not word.startswith("prompt=")]
    register(config_name, schema)
    if words[0] == "python" and "-m" in words[3:]:
        asked = multirun.flags(["-m", *overrides])
        composed = [job.config for job in multirun.jobs(asked, CONFIG_DIR, config_name)]
        assert len(composed) > 1
    else:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = [compose(config_name, overrides)]
    for config in map(OmegaConf.to_object, composed):
        if not isinstance(config, InferenceConfig):
            config.check()  # type: ignore[union-attr]
