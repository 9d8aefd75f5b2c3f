"""A setting that holds a name is taken as it was typed, whatever Hydra's grammar makes of the signs in it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from configs.program import entry
from configs.program.arguments import readable, settings_of_text
from data.config import PrepareConfig
from data.prepared.layout import MANIFEST
from inference.config import InferenceConfig
from tests.conftest import PROGRAMS
from train.config.train import TrainConfig

ROW = json.dumps({"instruction": "Add 1 and 2.", "input": "", "output": "3"})

NAMES = (
    "year=2026/rows",
    "a,b",
    "chats (v2)",
    "a [v1]",
    "[v1]",
    "{a: 1}",
    "two words",
    "it's",
    'a "b" c',
    "größe",
    "a#b!&;<>^`~",
    "2026.10",
    "1e5",
    "0x10",
    "true",
    "a: b",
    "glob(x)",
    "a\\",
)
"""Names that Hydra's grammar refuses, or makes a number, a list or a choice of; and some that it reads."""


@pytest.fixture
def config_of(monkeypatch: pytest.MonkeyPatch, run_program: Callable[..., Any]) -> Callable[..., Any]:
    """config_of("train", "run_dir=x"): the configuration that the program would get, or the sentence it ends with."""
    schemas = {"train": TrainConfig, "inference": InferenceConfig, "data": PrepareConfig}

    def config(program: str, *arguments: str) -> Any:
        got: list[Any] = []
        monkeypatch.setattr(f"{PROGRAMS[program]}.run", got.append)
        outcome = run_program(program, *arguments)
        assert (outcome.exit_code, len(got)) in ((0, 1), (2, 0)), outcome.stderr
        assert not got or type(got[0]) is schemas[program]
        return got[0] if got else outcome.stderr

    return config


def typed(argument: str, schema: type) -> Any:
    """What Hydra reads of an argument."""
    taken = readable([argument], schema)
    if taken.entries:
        return next(iter(taken.entries.values()))
    return OverridesParser.create().parse_override(taken.arguments[0]).value()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_as_it_stands(name: str) -> None:
    assert typed(f"run_dir={name}", TrainConfig) == name
    assert typed(f"model.path={name}", TrainConfig) == name
    assert typed(f"++adapter={name}", InferenceConfig) == name


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"a,b", "[v1]", "{a: 1}", "a\\"}))
def test_a_name_in_a_list_or_a_dictionary_is_taken_as_it_stands(name: str) -> None:
    assert typed(f"files=[{name}, rows (2).jsonl]", PrepareConfig) == [name, "rows (2).jsonl"]
    assert typed(f"contamination=[mmlu,{name}]", PrepareConfig) == ["mmlu", name]
    assert {key: int(value) for key, value in typed(f"limits={{{name}: 2, b: 3}}", PrepareConfig).items()} == {
        name: 2,
        "b": 3,
    }


@pytest.mark.parametrize(
    ("program", "settings"),
    [
        ("train", ("run_dir", "dataset", "name", "model.path", "lora.start", "lora.load", "logging.project")),
        ("inference", ("adapter", "base", "prompt_file", "input", "output", "revision", "licence")),
        ("data", ("output", "tokenizer", "dataset", "split", "revision")),
    ],
)
def test_the_program_gets_the_name(config_of: Callable[..., Any], program: str, settings: tuple[str, ...]) -> None:
    for names in (NAMES, NAMES[len(settings) :]):
        given = dict(zip(settings, names, strict=False))
        config = config_of(program, *(f"{setting}={name}" for setting, name in given.items()))
        assert {setting: attrgetter(setting)(config) for setting in given} == given


def test_the_program_gets_the_names(config_of: Callable[..., Any]) -> None:
    name = "it's [v1], 1"
    config = config_of(
        "data",
        f'files=[größe=1 (v2),"{name}"]',
        f'limits={{größe=1 (v2): 2, "{name}": 3}}',
        "weights={größe=1 (v2): 0.5}",
    )
    assert config.files == ["größe=1 (v2)", name]
    assert config.limits == {"größe=1 (v2)": 2, name: 3}
    assert config.weights == {"größe=1 (v2)": 0.5}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ('run_dir="a b, (c)"', "a b, (c)"),
        ("run_dir='a b, (c)'", "a b, (c)"),
        ('run_dir="a \\"b\\""', 'a "b"'),
        (r"run_dir=a\,b", "a,b"),
        ("run_dir= a ", "a"),
        ("run_dir=null", None),
        ("run_dir=runs/${optim.lr}", "runs/0.0002"),
        ("run_dir=runs (${optim.lr}, ${name})", "runs (0.0002, run)"),
        ("run_dir=${oc.env:NOT_SET,there}/x", "there/x"),
        ("run_dir=${oc.env:OF_TEST}/[x]", "a, b/[x]"),
        ("++run_dir=a=b", "a=b"),
    ],
)
def test_quotes_escapes_null_and_interpolations_stay(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, argument: str, value: str | None
) -> None:
    monkeypatch.setenv("OF_TEST", "a, b")
    assert config_of("train", argument).run_dir == value


def test_lists_and_dictionaries_stay() -> None:
    assert typed('files=["a, b",c d]', PrepareConfig) == ["a, b", "c d"]
    assert typed("""files=["a, b", 'c (1)', d (2)]""", PrepareConfig) == ["a, b", "c (1)", "d (2)"]
    assert typed("files=[]", PrepareConfig) == []
    assert typed('limits={"a, b": 2, c: 3}', PrepareConfig) == {"a, b": "2", "c": "3"}
    assert typed("limits={}", PrepareConfig) == {}
    assert typed('columns={output: the answer (text), input: "a, b"}', PrepareConfig) == {
        "output": "the answer (text)",
        "input": "a, b",
    }
    assert typed("lora.experts=[0,3]", TrainConfig) == [0, 3]


def test_interpolations_in_a_list_are_resolved(config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_TEST", "x")
    assert config_of("data", "files=[${oc.env:NOT_SET,y}/a (1), ${oc.env:OF_TEST}]").files == ["y/a (1)", "x"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["limits={rows.jsonl:", "10}"], ["limits={rows.jsonl:: it is not closed", "'limits={rows.jsonl: 10}'"]),
        (["limits={rows.jsonl:"], ["limits={rows.jsonl:: it is not closed", "in quotes: 'limits={rows.jsonl:…}'"]),
        (["files=[two"], ["files=[two", "not closed", "in quotes"]),
        (["files=a,b"], ["files=a,b: it takes a list; write 'files=[a,b]'"]),
        (["files=chats (v2).jsonl"], ["write 'files=[chats (v2).jsonl]'"]),
        (["limits=(2)"], ["data: limits=(2): ", "limits={name: value}"]),
        (["limits={(2)}"], ["data: limits={(2)}: ", "limits={name: value}"]),
        (["limits={a [v1]: x y}"], ["limits.a [v1]=x y", "not of type Integer"]),
        (["output=~/prepared"], ["output=~/prepared", "$HOME/prepared"]),
        (["files=[~/a.jsonl]"], ["files=~/a.jsonl", "$HOME/a.jsonl"]),
        (["output=a ${b"], ["output", "${b"]),
    ],
)
def test_what_cannot_be_a_name_is_one_sentence(
    config_of: Callable[..., Any], arguments: list[str], parts: list[str]
) -> None:
    sentence = config_of("data", *arguments)
    assert isinstance(sentence, str)
    assert sentence.count("\n") == 1
    for part in parts:
        assert part in sentence


def test_every_text_of_every_program_is_meant() -> None:
    assert settings_of_text(Example) == {
        "name": str,
        "path": str,
        "names": list[str],
        "shares": dict[str, float],
        "inner.path": str,
    }


@dataclass
class Inner:
    path: str = ""
    ranks: list[int] = field(default_factory=list)


@dataclass
class Example:
    name: str = ""
    path: str | None = None
    seed: int | None = None
    names: list[str] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    anything: Any = None
    inner: Inner = field(default_factory=Inner)


def test_a_sweep_stays_one_in_a_multirun() -> None:
    assert readable(["run_dir=a,b"], TrainConfig).arguments == ['run_dir="a,b"']
    for flag in ("-m", "--multirun"):
        swept = [flag, "dataset=a,b", "optim.lr=1e-3,1e-4", "run_dir=runs/${optim.lr}"]
        assert readable(swept, TrainConfig).arguments == swept
        assert readable([flag, "run_dir=a (1)"], TrainConfig).arguments == [flag, 'run_dir="a (1)"']


def test_rows_are_prepared_from_files_whatever_they_are_called(
    run_program: Callable[..., Any], tmp_path: Path, shared: Path
) -> None:
    names = shared / "field" / "rows" / "names"
    if not names.is_dir():
        pytest.skip(f"{names} is not here")
    files = sorted(str(path) for path in names.rglob("*.jsonl"))
    assert any("=" in file for file in files)
    output = "out=1, [a] (b)"
    outcome = run_program(
        "data", f"files=[{','.join(files)}]", f"limits={{{files[0]}: 1}}", f"output={output}", "eval_fraction=0"
    )
    assert outcome.exit_code == 0, outcome.stderr
    manifest = json.loads((tmp_path / output / MANIFEST).read_text())
    assert [source["file"] for source in manifest["inputs"]] == files
    assert run_program("data", "task=preview", f"output={output}").exit_code == 0


def test_a_bracket_of_the_name_in_a_pattern_is_explained(run_program: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a [v1]").mkdir()
    (tmp_path / "a [v1]" / "rows.jsonl").write_text(ROW)
    outcome = run_program("data", "files=[a [v1]/*.jsonl]")
    assert outcome.exit_code == 2
    assert "[[]" in outcome.stderr
    assert run_program("data", "files=[a [[]v1]/*.jsonl]", "eval_fraction=0").exit_code == 0


def test_entry_takes_dotted_dictionaries_apart() -> None:
    assert entry._nested(("a.b", {"c": "1"})) == {"a": {"b": {"c": "1"}}}
