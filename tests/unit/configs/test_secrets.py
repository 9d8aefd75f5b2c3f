"""Keys and passwords are hidden, and nothing else is."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.program import entry
from configs.program.secrets import HIDDEN, redact, redacted
from tests.conftest import Outcome

OF_WANDB = "89abcdef0123456789abcdef0123456789abcdef"
"""A key of wandb's, or a commit."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("HF_TOKEN", "tokenofthehub")
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery staple")
    monkeypatch.setenv("SHORT_KEY", "1")
    monkeypatch.setenv("TOKENIZER_PATH", "/models/mixtral")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("key 0123456789abcdef0123456789abcdef01234567 was refused", f"key {HIDDEN} was refused"),
        ("model.path=https://me:tokenofthehub@host/m", f"model.path=https://{HIDDEN}@host/m"),
        ("correct horse battery staple", HIDDEN),
        ("hf_abcdefghijABCDEFGHIJ12345", HIDDEN),
        ("+logging.wandb_key=abcdef0123456789", f"+logging.wandb_key={HIDDEN}"),
        ("https://user:pass@host/x", f"https://{HIDDEN}@host/x"),
        (f"logging.project={OF_WANDB}", f"logging.project={HIDDEN}"),
        (f"logging.wandb={OF_WANDB}: give offline", f"logging.wandb={HIDDEN}: give offline"),
        ("logging.project=wandb_v1_abcdefghijABCDEFGHIJ", f"logging.project={HIDDEN}"),
        (OF_WANDB, HIDDEN),
    ],
)
def test_secrets_are_hidden(text: str, hidden: str) -> None:
    assert redact(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "step 1: loss 1.1",
        f"model.revision={OF_WANDB}",  # a commit is no secret
        f"revision={OF_WANDB}: there is no such commit",
        f"run_dir={OF_WANDB}",
        f"model.path=models--m/snapshots/{OF_WANDB}",
        f"model.path={OF_WANDB}/base",
        f"sha256={OF_WANDB}{OF_WANDB[:24]}",
        f"at commit {OF_WANDB}",
        "runs/openhermes/checkpoints/step-000111",
        "https://host/path:with@signs",
        "lora.rank=16",
        "model.path=/models/mixtral/base",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert redact(text) == text


def test_tracebacks_hide_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError("https://me:tokenofthehub@host: refused")
    entry._traceback(OSError, error, None)
    assert capsys.readouterr().err == f"OSError: https://{HIDDEN}@host: refused\n"


def test_nothing_but_the_traceback_is_said_where_a_program_fails(
    run_program: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra would add a line with the overrides as they were typed."""

    def fail(config: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("train.run.run", fail)
    with pytest.raises(RuntimeError, match=r"\Ano\Z") as error:
        run_program("train", "lora=none", f"logging.project={OF_WANDB}")
    assert capsys.readouterr().err == ""
    assert not any("hydra" in str(entry.path) for entry in error.traceback)


def test_a_sweep_says_and_writes_no_secret(run_program: Callable[..., Outcome], tmp_path: Path) -> None:
    """Hydra's own would write multirun.yaml."""
    sweep = ("-m", "lora=none", f"logging.project=tokenofthehub,{OF_WANDB}", "run_dir=r")
    outcome = run_program("train", *sweep)
    assert outcome.exit_code == 2
    assert f"logging.project={HIDDEN}" in outcome.stderr
    assert "tokenofthehub" not in outcome.stderr
    assert OF_WANDB not in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_tracebacks_of_threads_hide_them_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", entry._traceback_of_thread)

    def fail() -> None:
        raise OSError("https://me:tokenofthehub@host: refused")

    for end in (fail, sys.exit):
        thread = threading.Thread(target=end, name="one")
        thread.start()
        thread.join()
    said = capsys.readouterr().err
    assert said.startswith("Exception in thread one:\nTraceback (most recent call last):\n")
    assert said.endswith(f"\nOSError: https://{HIDDEN}@host: refused\n")
    assert said.count("Exception") == 1


def test_at_any_depth() -> None:
    value = {"a": ["hf_abcdefghijABCDEFGHIJ12345", 1], "b": {"c": ("tokenofthehub", None, 2.5)}}
    assert redacted(value) == {"a": [HIDDEN, 1], "b": {"c": [HIDDEN, None, 2.5]}}


def test_commits_stay_where_they_are_expected() -> None:
    value = {"model": {"revision": OF_WANDB}, "commit": OF_WANDB, "logging": {"project": OF_WANDB}}
    assert redacted(value) == value | {"logging": {"project": HIDDEN}}
    assert redacted({"revision": "hf_abcdefghijABCDEFGHIJ12345"}) == {"revision": HIDDEN}
