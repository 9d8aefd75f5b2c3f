"""Every README is true: the programs accept its commands, shells expand nothing in them, and its paths exist."""

from pathlib import Path

import pytest

from tests.support.readmes import (
    FOLDERS,
    SETTING,
    commands,
    door_plate,
    missing,
    problem,
    readmes,
    rooms_left_out,
    spans,
    unknown_settings,
    unquoted,
)

ROOT = Path(__file__).parents[2]
FIRST_README_LINES = 180


ROOMS = sorted(path.parent for folder in FOLDERS[:-1] for path in (ROOT / folder).rglob("__init__.py"))
COMMANDS = {
    command: f"{readme.relative_to(ROOT)}: {command}"
    for readme in reversed(readmes(ROOT))
    for command in commands(readme.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("command", [pytest.param(command, id=name) for command, name in COMMANDS.items()])
def test_a_command_works(command: str) -> None:
    assert problem(command, ROOT) is None


@pytest.mark.parametrize("readme", readmes(ROOT), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_setting_can_be_pasted(readme: Path) -> None:
    settings = [span for span in spans(readme.read_text(encoding="utf-8")) if SETTING.match(span)]
    assert not [setting for setting in settings if unquoted(setting)]


@pytest.mark.parametrize("readme", readmes(ROOT), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_setting_exists(readme: Path) -> None:
    assert unknown_settings(readme.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("readme", readmes(ROOT), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_readme_names_is_there(readme: Path) -> None:
    assert missing(readme, ROOT) == []


def test_every_room_is_on_a_map() -> None:
    assert rooms_left_out(ROOT) == []


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_door_plate_lists_what_is_in_the_room(room: Path) -> None:
    listed, there = door_plate(room)
    assert listed == there


@pytest.mark.parametrize("folder", ["benchmarks", "tortures"])
def test_every_subcommand_is_named(folder: str) -> None:
    room = ROOT / "scripts" / folder
    named = commands((room / "README.md").read_text(encoding="utf-8"))
    script = f"python scripts/{folder.removesuffix('s')}.py"
    assert {f"{script} {path.stem}" for path in room.glob("*.py") if path.stem != "__init__"} <= set(named)


def test_the_first_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= FIRST_README_LINES


# Whether the tests above would find it


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python -m data 'files=[rows.jsonl]' 'limits={rows.jsonl: 10}' output=prepared/mine", None),
        ("python -m data files=[rows.jsonl] output=prepared/mine", "a shell would expand ["),
        ("python -m data data=sampel", "there is no such choice"),
        ("python -m train recipe=quickstart optim.rate=1", "there is no such setting"),
        ("python -m train lora=none --cfg job", None),
        ("python -m train -m lora=none optim.lr=1e-4,2e-4 run_dir='runs/${optim.lr}'", None),
        ("python -m train -m lora=none optim.rate=1e-4,2e-4", "there is no such setting"),
        ("python -m train -m lora=none optim.lr=1e-4,-1", "optim.lr=-1"),
        ("python -m data -m data=sample,openhermes", "does not sweep"),
        ("python -m trane lora=none", "there is no program trane"),
        ("deepspeed --no_local_rank --module train lora=none task=profle", "there is no such choice"),
        ('python -m inference adapter=a prompt="Hello, [who] are you?"', None),
        ("python -m inference task=merge adapter=a", "has nowhere to write"),
        ("./scripts/launch/per_node.sh --nodes 2 lora=none", None),
        ("./scripts/launch/per_node.sh --knots 2 lora=none", "has no option --knots"),
        ("DS_ACCELERATOR=cpu ./scripts/launch/per_node.sh lora=nought", "there is no such choice"),
        ("sbatch scripts/launch/slum.sbatch lora=none", "there is no scripts/launch/slum.sbatch"),
        ("python scripts/benchmark.py step --curves", None),
        ("python scripts/benchmark.py stop", "has no subcommand stop"),
        ("./scripts/test.sh tests/unit # zsh passes comments on", "a shell would expand #"),
    ],
)
def test_a_wrong_command_is_found(command: str, wrong: str | None) -> None:
    found = problem(command, ROOT)
    assert (found is None) if wrong is None else (found is not None and wrong in found)


def test_commands_are_found_in_blocks_and_in_the_text() -> None:
    text = (
        "10. Run `python -m data data=sample`, or `python -m\n    train …`; `data.run` is none.\n\n"
        "    python -m train \\\n        lora=none\n    step 0: loss 1\n\n"
        "```\nDS_ACCELERATOR=cpu deepspeed --module train\n```\n"
    )
    assert commands(text) == [
        "python -m train lora=none",
        "DS_ACCELERATOR=cpu deepspeed --module train",
        "python -m data data=sample",
    ]


def test_an_unknown_setting_is_found() -> None:
    text = "`lora.rank`, `lora.rang`, `deepspeed=zero2`, `overlap=drop`, `'limits={a.b: 1}'`, `NODES=1`, `data.run`"
    assert unknown_settings(text) == ["lora.rang", "overlap"]


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    room = tmp_path / "train" / "lora"
    room.mkdir(parents=True)
    plate = room / "__init__.py"
    plate.write_text('"""Adapters.\n\n    attach.py, apply.py  beside `other.py`\n    gone/  not there\n"""\n')
    for name in ("attach.py", "factors.py", "__main__.py"):
        (room / name).touch()
    (tmp_path / "CONTRIBUTING.md").touch()
    first, readme = tmp_path / "README.md", tmp_path / "train" / "README.md"
    first.write_text("[train](train/README.md#the-map), `train/lora/`, `runs/mine`, [out](https://example.org/x)\n")
    readme.write_text("# Train\n\n## The map: rooms\n\n`lora/attach.py` `attach.py` `config.yaml` [up](../README.md)\n")
    assert readmes(tmp_path) == [first, tmp_path / "CONTRIBUTING.md", readme]
    assert missing(first, tmp_path) == ["train/README.md#the-map"]
    assert missing(readme, tmp_path) == ["attach.py"]
    assert rooms_left_out(tmp_path) == ["train/lora"]
    readme.write_text("## The map\n\n[lora/](lora), [gone](model/head.py), `train/model`\n")
    assert missing(first, tmp_path) == []
    assert missing(readme, tmp_path) == ["model/head.py", "train/model"]
    assert rooms_left_out(tmp_path) == []
    assert door_plate(room) == ({"attach.py", "apply.py", "gone/"}, {"attach.py", "factors.py"})
