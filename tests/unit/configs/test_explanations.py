"""A command line that is wrong is answered by what is true of it, and `--help` tells all that can be typed."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from configs.program.entry import CONFIG_DIR
from configs.program.explanations import again, names
from configs.program.explanations.help import docstrings
from configs.program.explanations.program import Program
from data.config import PrepareConfig
from inference.config import InferenceConfig
from tests.support.readmes import problem, settings_of
from train.config.train import TrainConfig

SCHEMAS: dict[str, type] = {"data": PrepareConfig, "train": TrainConfig, "inference": InferenceConfig}
FILES = {"data": "prepare", "train": "train", "inference": "inference"}
PROGRAMS = {name: Program(name, FILES[name], schema, CONFIG_DIR) for name, schema in SCHEMAS.items()}

WRONG = {
    "train lora=none +optim.lr=1": "optim.lr: the setting is there, and takes no plus; write optim.lr=1",
    "train +lora=none": "lora: the group is there, and takes no plus; write lora=none",
    "train lr=1e-4": "lr: there is no such setting; did you mean optim.lr?",
    "train optim.learning_rate=1e-4": "optim.learning_rate: there is no such setting; did you mean optim.lr?",
    "train per_device_train_batch_size=8": "did you mean micro_batch?",
    "train batch_size=8": "did you mean global_batch?",
    "train gradient_accumulation_steps=4": "it is global_batch / (micro_batch × processes)",
    "train num_train_epochs=3": "did you mean epochs?",
    "train max_length=1024": "seq_len of `python -m data`",
    "data max_length=1024": "did you mean seq_len?",
    "inference max_length=5 prompt=hi": "did you mean max_new_tokens?",
    "train +data=sample": "data: `python -m train` has no such group; it is one of `python -m data`; what that writes",
    "data recipe=quickstart": "recipe: `python -m data` has no such group; it is one of `python -m train`\n",
    "inference model=x prompt=hi": "model: there is no such setting; did you mean base?",
    "train router_aux_loss=inf": "router_aux_loss=inf: it must be finite",
    "train optim.weight_decay=nan": "optim.weight_decay=nan: it must be finite",
    "train optim.lr=1e-3,1e-4": "optim.lr=1e-3,1e-4: it takes one value; several are a sweep, which -m asks for",
    "train optim.lr=2,0e-4": "if it is one number, write optim.lr=2.0e-4",
    "train lora.alpha=32.0": "lora.alpha=32.0: that is not of type Integer; write 32",
    "train epochs=1e1": "epochs=10.0: that is not of type Integer; write 10",
    "train lora.rank=1.5": "lora.rank=1.5: that is not of type Integer; give a value of that type",
    "train ~optim.lr": "optim.lr: ~ takes away a group's choice",
    "train ~epochs recipe=quickstart --cfg job": "epochs: ~ takes away a group's choice",
    "train run_dir=${oc.env:NO_SUCH_VARIABLE}/x": "run_dir: the variable NO_SUCH_VARIABLE is not set",
    "train run_dir=${optim.rate}": "run_dir: there is no setting optim.rate, which ${optim.rate} names",
    "train --config-name nosuch": "--config-name=nosuch: there is no nosuch.yaml",
    "train --config-dir nosuch": "--config-dir=nosuch: there is no such directory",
    "train recipe=quickstart hydra/launcher=submitit_slurm": "use",
    "train quickstart": "quickstart: it is a choice of recipe; write recipe=quickstart",
    "train --epochs 3": "--epochs: settings have no dashes in front; write epochs=3",
    "train --epochs=3": "--epochs: settings have no dashes in front; write epochs=3",
    "train --learning-rate 3": "learning_rate: there is no such setting; did you mean optim.lr?",
    "data --files x": "--files: settings have no dashes in front; write 'files=[x]'",
    "train --conf x": "--conf: ",
}
"""Command line → what its sentence holds."""


@pytest.mark.parametrize("command", WRONG)
def test_the_sentence_says_what_is_wrong(run_program: Callable[..., Any], command: str) -> None:
    program, *arguments = command.split(" ")
    outcome = run_program(program, *arguments)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert re.fullmatch(rf"{program}: [\w./-]+(=[^:]*)?: .*\n", outcome.stderr) or "${" in command, outcome.stderr
    assert WRONG[command] in outcome.stderr


@pytest.mark.parametrize("program", SCHEMAS)
def test_other_projects_names_stand_for_settings_that_there_are(program: str) -> None:
    known = PROGRAMS[program].settings()
    for name, target in names.CALLED[program].items():
        assert name not in known
        if " " not in target:
            assert target in known
        assert "`--help`" not in names.unknown(name, PROGRAMS[program])


OWN = {
    "lora: none\n": "its first line must be `# @package _global_`",
    "": "it holds no settings",
    "# @package _global_\n- a\n": "it holds a list",
    "# @package _global_\ndefaults:\n  - override lora: none\n": "be a folder in recipe/; write `override /lora: none`",
    "# @package _global_\ndefaults:\n  - /lora: none\n": "one choice too many; write `override /lora: none`",
    "# @package _global_\ndefaults:\n  - no_list\n": "no_list.yaml: it holds one value",
    "# @package _global_\nname: ${oc.env:NO_SUCH_VARIABLE}\n": "name: the variable NO_SUCH_VARIABLE is not set",
    "# @package _global_\noptim:\n  learning_rate: 1\n": "did you mean optim.lr?",
    "# @package _global_\nepochs: 1e1\n": "write 10",
}
"""A recipe of a user's own → what is said of it."""


@pytest.mark.parametrize("text", OWN)
def test_a_recipe_of_ones_own_is_explained(run_program: Callable[..., Any], tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "own.yaml").write_text(text)
    (tmp_path / "recipe" / "no_list.yaml").write_text("# @package _global_\nvalue\n")
    outcome = run_program("train", f"--config-dir={tmp_path}", "recipe=own")
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.count("\n") == 1
    assert OWN[text] in outcome.stderr


def test_a_recipe_of_ones_own_may_build_on_another(run_program: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    own = "# @package _global_\ndefaults:\n  - quickstart\n  - override /lora: attention\n  - _self_\nepochs: 1\n"
    (tmp_path / "recipe" / "own.yaml").write_text(own)
    outcome = run_program("train", f"--config-dir={tmp_path}", "recipe=own", "--cfg", "job")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    composed = OmegaConf.create(outcome.stdout)
    assert (composed.epochs, composed.optim.lr, composed.lora.projections) == (1, 1.2e-2, [])


# --help


@pytest.mark.parametrize("program", SCHEMAS)
def test_help_tells_commands_groups_and_every_setting(run_program: Callable[..., Any], program: str) -> None:
    outcome = run_program(program, "--help")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert "Hydra" not in outcome.stdout
    of_program = re.findall(r"^  ((?:python|deepspeed) -.*?)(?:   .*)?$", outcome.stdout, re.M)
    assert len(of_program) == 5
    for command in of_program:
        assert problem(command, CONFIG_DIR.parent) is None, command
    for setting in settings_of(SCHEMAS[program]):
        assert re.search(rf"^  {re.escape(setting)}[=:]", outcome.stdout, re.M), setting
    told = re.findall(r"^  (\w+) +[\w*]+(?:, [\w*]+)*$", outcome.stdout, re.M)
    listed = OmegaConf.load(CONFIG_DIR / f"{FILES[program]}.yaml").defaults
    assert told == [str(key) for item in listed if not isinstance(item, str) for key in item if "override" not in key]


def test_help_shows_the_values_as_they_would_be(run_program: Callable[..., Any]) -> None:
    shown = run_program("train", "recipe=quickstart", "optim.lr=1e-3", "--help").stdout
    for line in ("  optim.lr=0.001", "  epochs=3", "  model.path=runs/quickstart-base/model", "  lora.start=null"):
        assert f"\n{line}\n" in shown
    assert run_program("train", "--help", "epoch=1").exit_code == 2


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_setting_has_a_docstring(schema: type) -> None:
    told = docstrings(schema)
    for field in fields(schema):
        assert told[field.name]
        if is_dataclass(field.type):
            test_every_setting_has_a_docstring(field.type)  # type: ignore[arg-type]


def test_mistakes_and_help_need_no_torch(project_root: Path) -> None:
    """Which takes seconds to import."""
    code = (
        "import sys; sys.argv = ['train', *sys.argv[1:]]\n"
        "from train.program import main\n"
        "try: main()\nfinally: assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    for arguments, expected in ((["--help"], 0), (["recipe=quickstart", "--cfg", "job"], 0), (["epochs=0"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=project_root, capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, done.stderr


@pytest.mark.parametrize("program", SCHEMAS)
def test_without_the_environment_it_says_how_to_activate_it(project_root: Path, program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", program, "--help"], cwd=project_root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{program}: hydra: .* `source \.venv/bin/activate`.*\n", done.stderr)


# How a run goes on

WITHIN = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from configs.program.explanations.again import command
print(command("train", Path("runs/new")))
"""


@pytest.fixture
def typed(tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a program called train, in a folder of its own, says of how it was started by a command."""
    (tmp_path / "train.py").write_text(WITHIN.format(root=str(project_root)))
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/usr/bin/env bash\nshift\npython -u -m train "$@"\nexit $?\n')
    launcher.chmod(0o755)
    for name in ("WORLD_SIZE", "SECRET_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]))

    def said(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    return said


def test_the_command_that_was_typed_goes_on(typed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed("python", "-m", "train", "a=[1]", "run_dir=x y") == "python -m train 'a=[1]' 'run_dir=x y'"
    assert typed("python", "-m", "train", "a=1") == "python -m train a=1 run_dir=runs/new"
    assert typed("python", "-m", "train") == "python -m train run_dir=runs/new"
    once = typed("python", "-m", "train", "overwrite=true", "run_dir=r")
    assert once == "python -m train run_dir=r"
    monkeypatch.setenv("SECRET_TOKEN", "abcdefghijk")
    assert typed("python", "-m", "train", "logging.project=abcdefghijk", "run_dir=r").count("<secret>") == 1


def test_the_command_is_the_launchers(
    typed: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert typed("launcher", "--nodes", "a=1", "run_dir=r") == "launcher --nodes a=1 run_dir=r"
    assert typed("python", "-m", "train", "a=1", "run_dir=r") == "None"  # variables belong to it
    shell = f"exec {shlex.quote(sys.executable)} -m train a=1"
    assert typed("bash", "-c", f"{shell}; true", "train", "a=1") == "None"


def test_the_command_is_not_known_in_another_program() -> None:
    assert again.command("train", Path("r")) is None
