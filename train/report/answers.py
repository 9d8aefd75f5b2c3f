"""The answers of base and tuned model to the same prompts, by `python -m inference` in a process of its own."""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.program.errors import UserError
from data.disk.files import replace_file
from data.disk.formats import sizes
from data.disk.formats.json_text import parse_json
from data.disk.formats.regular import UnreadableError
from data.disk.plain_text import member, read_bytes
from train.report.recorded import Recorded
from train.run_files import ANSWERS

PROMPTS = Path(__file__).with_name("prompts.jsonl")


def ask(run: Recorded, prompts: str | None, *, new_tokens: int) -> list[dict[str, Any]]:
    """Asks both models, writes `answers.json` into the run directory, and returns what it holds.

    Args:
        run: whose adapter, or whole model, is the tuned one.
        prompts: a file as `task=batch` takes it; None for the ten of the project.
        new_tokens: of an answer, at most.

    Raises:
        UserError: the inference program refuses; its sentence is kept.
    """
    source = Path(prompts) if prompts else PROMPTS
    base = member(run.settings, "model").get("path")
    tuned: list[str] = []
    if (run.directory / "adapter").is_dir():
        tuned = [f"adapter={run.directory / 'adapter'}", f"base={base}"]
    elif (run.directory / "model").is_dir():
        tuned = [f"base={run.directory / 'model'}"]
    else:
        raise UserError(
            f"run_dir={run.directory}: it holds no result yet, so nothing can be asked; let it finish, or "
            f"give answers=false"
        )
    models = {"tuned": tuned} | ({} if base is None else {"base": [f"base={base}"]})
    by_line: dict[Any, dict[str, Any]] = {}
    for name, model in models.items():
        for line in _answers(model, source, new_tokens):
            by_line.setdefault(line.get("line", line.get("row")), {})[name] = line.get("answer")
    asked = _prompts(source)
    answers = [{"prompt": asked.get(number, f"row {number}"), **both} for number, both in sorted(by_line.items())]
    replace_file(run.directory / ANSWERS, [json.dumps(answers, indent=1, ensure_ascii=False).encode() + b"\n"])
    return answers


def _answers(model: list[str], source: Path, new_tokens: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as top:
        output = Path(top) / "answers.jsonl"
        settings = [f"input={source}", f"output={output}", f"max_new_tokens={new_tokens}", "batching=padded"]
        command = [sys.executable, "-m", "inference", "task=batch", *model, *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["inference: it gave no reason; give answers=false"])[-1]
            raise UserError(f"answers: {said.removeprefix('inference: ')}")
        return [parse_json(line, dict[str, Any]) for line in output.read_bytes().splitlines()]


def _prompts(source: Path) -> dict[int, str]:
    """The text of each row by its line, as far as it is plain to see."""
    texts = {}
    for number, line in enumerate((read_bytes(source, sizes.LINES) or b"").splitlines(), 1):
        with contextlib.suppress(UnreadableError):  # a line of a form that batch reads and this does not
            row = parse_json(line, dict[str, Any])
            texts[number] = str(row.get("prompt") or row.get("instruction") or line.decode("utf-8-sig"))
    return texts
