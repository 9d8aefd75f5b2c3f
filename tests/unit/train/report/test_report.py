"""The page about a run: it says what the files say, whatever state the run is in, and asks nothing of a network."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.program.errors import UserError
from train.config.train import TrainConfig
from train.report import answers as module
from train.report.answers import ask
from train.report.recorded import changed_settings, note_launch, read_run
from train.report.report import try_report, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Text(HTMLParser):
    """The visible text of a page, and everything that it would ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.asked: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def line(step: int, **values: Any) -> dict[str, Any]:
    standard = {"loss": 2.0 / step, "learning_rate": 0.001, "gradient_norm": 0.5, "applied": True}
    return {"step": step, **standard, "tokens": 64, "tokens_per_second": 900.0, "memory_gib": 0.5, **values}


LINES = [
    {"step": 0, "evaluation_loss": 3.25},
    line(1, auxiliary_loss=2.5),  # what it was once called
    {"step": 1, "expert_load": [[0.75, 0.25]], "router_entropy": [0.5], "load_balancing_loss_by_layer": [1.0]},
    line(2, gradient_norm="inf", applied=False, wrong="refused", rows=[4]),
    line(3, load_balancing_loss=2.25),
    {"step": 3, "checkpoint_paused_seconds": 0.01, "checkpoint_seconds": 0.2},
    {"step": 3, "evaluation_loss": 2.125},
]
RECEIPT: dict[str, Any] = {
    "started": "2026-01-01T00:00:00+00:00",
    "written": "2026-01-01T00:01:00+00:00",
    "hardware": {"processes": 2, "device": "cpu"},
    "dataset": {"path": "prepared/gone", "manifest_sha256": "00"},
    "experts_moved": [{"layer": 0, "projection": "down_proj", "ranks": [4, 0], "norms": [0.125, 0.0]}],
}


def make_run(top: Path, **settings: Any) -> Path:
    directory = top / "run <i>"
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump({"epochs": 5, "dataset": "prepared/gone", **settings}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LINES) + '{"step": 4, "lo')
    (directory / "receipt.json").write_text(json.dumps(RECEIPT))
    return directory


def test_the_page_says_what_the_run_recorded(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    note_launch(directory, "2026-01-01T00:00:30+00:00", 2, 1)
    (directory / "answers.json").write_text(
        json.dumps([{"prompt": "Hi?", "base": "no", "tuned": "<script>x</script>"}])
    )
    page = write_report(directory).read_text(encoding="utf-8")
    shown = Text(page)
    text = "\n".join(shown.texts)
    for part in (
        "run <i>",
        "3.2500 → 2.1250",
        "0.6667",
        "step 2: the update was skipped",
        "step 3: checkpoint, on the disk after 0.2 s",
        "went on after step 1 at 2026-01-01T00:00:30+00:00, on 2 processes",
        "layer 0, expert 0: 0.125",
        "layer 0, expert 1: none",
        "<script>x</script>",
        "prepared/gone is not there any more",
    ):
        assert part in text, part
    assert "script" not in shown.tags
    assert shown.asked == []
    assert not re.findall(r"url\(|@import|https?://", page)


def test_a_quantity_that_was_once_called_otherwise_is_one_line(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path)).series("load_balancing_loss") == [(1, 2.5), (3, 2.25)]


def test_a_run_that_has_just_begun_and_a_damaged_one_have_a_page(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    (directory / "receipt.json").write_text('{"started": ')
    (directory / "metrics.jsonl").write_bytes(b"\xff\x00 no line\n[1]\n" + json.dumps({"step": "x"}).encode() + b"\n")
    assert "that has saved nothing yet" in write_report(directory).read_text()
    (directory / "metrics.jsonl").unlink()
    write_report(directory)


@pytest.mark.parametrize("kind", ["a pipe", "a link"])
def test_a_launch_is_noted_in_no_pipe_and_nowhere_else(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "launches.jsonl"
    os.mkfifo(place) if kind == "a pipe" else place.symlink_to(tmp_path / "elsewhere")
    note_launch(tmp_path, "2026-01-01T00:00:00+00:00", 1, 0)
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("receipt.json", '{"hardware": 5, "dataset": []}'),
        ("receipt.json", json.dumps({**RECEIPT, "experts_moved": [5]})),
        ("receipt.json", "[" * 5000),
        ("receipt.json", json.dumps({**RECEIPT, "plan": {"memory": 5}})),
        ("receipt.json", json.dumps({**RECEIPT, "experts_moved": [{**RECEIPT["experts_moved"][0], "ranks": [4]}]})),
        ("metrics.jsonl", '{"step": 1, "expert_load": [[]], "router_entropy": [0.5]}\n'),
        ("evaluation/results.json", '{"tasks": {"arc": 5}}'),
        ("evaluation/results.json", '{"tasks": {"arc": {"score": 1, "standard_error": 1e300, "questions": 4}}}'),
        ("evaluation/results.json", None),
        ("answers.json", '[{"base": "no"}]'),
        (
            "metrics.jsonl",
            f'{{"step": {"9" * 400}}}\n{{"step": -1}}\n{"[" * 5000}\n{{"step": 1, "loss": {"9" * 400}}}\n',
        ),
        ("metrics.jsonl", '{"step": 1, "expert_load": 5, "router_entropy": []}\n'),
        ("launches.jsonl", '{"resumed_after_step": "x"}\n'),
        ("answers.json", "[" * 5000),
        ("metrics.jsonl", None),
        ("receipt.json", None),
        ("answers.json", None),
    ],
)
def test_what_is_damaged_in_a_run_is_left_out(tmp_path: Path, name: str, content: str | None) -> None:
    """None stands for a pipe into which nobody writes."""
    directory = make_run(tmp_path)
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name) if content is None else (directory / name).write_text(content)
    told: list[str] = []
    page = write_report(directory, told.append).read_text()
    assert "</html>" in page
    assert "tokens/s, median" in page or name == "metrics.jsonl"  # what is sound is shown
    if not name.endswith(".jsonl"):
        (line,) = told
        assert line.startswith("Left out: ")
        assert line.removeprefix("Left out: ").split(" ")[0] in page


@pytest.mark.parametrize("name", ["receipt.json", "metrics.jsonl", "evaluation/results.json"])
def test_a_link_out_of_the_run_is_left_out(tmp_path: Path, name: str) -> None:
    directory, elsewhere = make_run(tmp_path), tmp_path / "elsewhere"
    (directory / name).parent.mkdir(exist_ok=True)
    content = (directory / name).read_text() if (directory / name).exists() else '{"tasks": {"stolen": 1}}'
    (directory / name).unlink(missing_ok=True)
    elsewhere.write_text(content)
    (directory / name).symlink_to(elsewhere)
    told: list[str] = []
    page = write_report(directory, told.append).read_text()
    if name == "metrics.jsonl":
        assert "tokens/s, median" not in page
    else:
        assert "it is a link out of its directory" in told[0]


def test_movements_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    moved = {"layer": 0, "projection": "down_proj", "ranks": [4, 4], "norms": [0.125, "nan"]}
    (directory / "receipt.json").write_text(json.dumps({**RECEIPT, "experts_moved": [moved]}))
    assert "layer 0, expert 0: 0.125" in "\n".join(Text(write_report(directory).read_text()).texts)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="it holds no run"):
        write_report(tmp_path)
    directory = make_run(tmp_path)
    (tmp_path / "elsewhere").write_text((directory / "config.yaml").read_text())
    for settings in ("a: &a [x]\nb: [*a, *a]\n", "a: [", None):
        (directory / "config.yaml").unlink()
        if settings is None:
            (directory / "config.yaml").symlink_to(tmp_path / "elsewhere")
        else:
            (directory / "config.yaml").write_text(settings)
        with pytest.raises(UserError, match=r"its config.yaml can't be read"):
            read_run(directory)
    try_report(directory)  # while training, a line and no more
    assert "training goes on" in capsys.readouterr().err


def test_settings_beside_their_defaults() -> None:
    assert changed_settings({"epochs": 5, "seed": 0, "lora": {"rank": 99}, "gone": 1}) == [
        ("epochs", 5, TrainConfig().epochs),
        ("lora.rank", 99, TrainConfig().lora.rank),
        ("gone", 1, None),
    ]


def test_scores_beside_the_adapter_are_shown(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    (directory / "evaluation").mkdir()
    tuned, base = ({"score": score, "standard_error": 0.01, "questions": 50} for score in (0.62, 0.6))
    pair = {"difference": {"value": 0.02, "error": 0.005}, "won": 3, "lost": 2, "p": 1.0, "p_holm": 1.0}
    average = {"score": 0.62, "standard_error": 0.0025}
    results = {
        "tasks": {"arc": tuned},
        "average": average,
        "before": {"tasks": {"arc": base}, "average": None},
        "comparison": {"tasks": {"arc": pair}, "average": {"value": 0.02, "error": 0.00125}},
    }
    (directory / "evaluation" / "results.json").write_text(json.dumps(results))
    text = "\n".join(Text(write_report(directory).read_text()).texts)
    for part in (
        "62.00 ± 1.00",
        "60.00 ± 1.00",
        "+2.00 ± 0.50",
        "ARC, tuned: 62.00 ± 1.00",
        "62.00 ± 0.25",
        "+2.00 ± 0.12",
    ):
        assert part in text


def test_published_scores_and_tasks_of_the_harness_are_shown(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    (directory / "evaluation").mkdir()
    row = {"whose": "the base", "source": "its card"}
    metric = {"acc": {"value": 0.5, "standard_error": 0.25}, "odd": {"value": None, "standard_error": None}}
    results = {
        "tasks": {"arc": {"score": 0.62, "standard_error": 0.01, "questions": 50}},
        "average": None,
        "published": [
            {"task": "arc", "score": 0.65, "standard_error": 0.0139} | row,
            {"task": "average", "score": 0.727, "standard_error": None} | row,
        ],
        "before": {"tasks": {}, "others": {"ifeval": {"shots": 0, "questions": 1541, "metrics": {}}}},
        "others": {"ifeval": {"shots": 0, "questions": 1541, "metrics": metric}},
    }
    path = directory / "evaluation" / "results.json"
    path.write_text(json.dumps(results))
    texts = [text for text in Text(write_report(directory).read_text()).texts if text]
    start = texts.index("Beside what was published") + 6
    assert texts[start : start + 5] == ["ARC", "62.00 ± 1.00", "65.00 ± 1.39", "-3.00", "the base"]
    assert "the base: its card." in texts
    assert "Fewer than 400 questions of ARC: too few to be compared with what was published." in texts
    assert "72.70" not in texts  # of an average that was not measured
    start = texts.index("Tasks of lm-eval") + 7
    assert texts[start : start + 6] == ["ifeval", "acc", "0", "1541", "–", "0.5000 ± 0.2500"]
    path.write_text(json.dumps(results | {"tasks": {}, "published": []}))
    assert "0.5000 ± 0.2500" in write_report(directory).read_text()


def test_the_entropy_of_the_routers_is_a_heatmap_over_the_steps(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    lines = [
        {"step": step, "expert_load": [[0.75, 0.25]] * 5, "router_entropy": [0.5 + layer / 10 for layer in range(5)]}
        for step in range(1, 2001)
    ]
    lines[-1]["router_entropy"] = ["nan"] * 5
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    texts = Text(write_report(directory).read_text()).texts
    for layer in range(5):
        cells = [text for text in texts if text.startswith(f"layer {layer}, step ")]
        shown = [text for text in cells if text.endswith((f": {0.5 + layer / 10:.3g}", ": none"))]
        assert f"layer {layer}, step 1: {0.5 + layer / 10:.3g}" in shown
        assert f"layer {layer}, step 2,000: none" in shown
    assert "nats, step by step; full colour is 0.693, all experts alike, and none is 0, one expert alone" in texts


def test_a_plan_in_the_receipt_stands_beside_what_was_measured(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    plan = {
        "peak memory of process 0, GiB": {"planned": 41.5, "measured": 40.25},
        "seconds a step": {"planned": 12.5, "measured": None},  # of a run that has made no step yet
    }
    (directory / "receipt.json").write_text(json.dumps({**RECEIPT, "plan": plan}))
    texts = [text for text in Text(write_report(directory).read_text()).texts if text]
    start = texts.index("Planned and measured")
    assert texts[start + 1 : start + 9] == [
        *("planned", "measured"),
        *("peak memory of process 0, GiB", "41.5", "40.25"),
        *("seconds a step", "12.5", "–"),
    ]


def test_base_and_tuned_model_are_asked_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inference program itself is tested elsewhere; here it is what it is asked, and what becomes of it."""
    directory = make_run(tmp_path, model={"path": "models/base"})
    (directory / "adapter").mkdir()
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        output = next(part.removeprefix("output=") for part in command if part.startswith("output="))
        who = "tuned" if any(part.startswith("adapter=") for part in command) else "base"
        Path(output).write_text(json.dumps({"line": 1, "answer": f"I am {who}"}) + "\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    asked = ask(read_run(directory), None, new_tokens=7)
    assert asked == [{"prompt": "Hello, who are you?", "tuned": "I am tuned", "base": "I am base"}]
    assert json.loads((directory / "answers.json").read_text()) == asked
    assert [("base=models/base" in command, "max_new_tokens=7" in command) for command in commands] == [
        (True, True)
    ] * 2

    refused = subprocess.CompletedProcess[str]([], 2, "", "noise\ninference: base=x: there is no such directory\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(UserError, match="answers: base=x: there is no such directory"):
        ask(read_run(directory), None, new_tokens=7)
    shutil.rmtree(directory / "adapter")
    with pytest.raises(UserError, match="it holds no result yet"):
        ask(read_run(directory), None, new_tokens=7)


def test_the_program_reports(run_program: Callable[..., Any], tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    done = run_program("train", "task=report", f"run_dir={directory}", "answers=false")
    assert done.exit_code == 0
    assert (directory / "report.html").is_file()
    assert run_program("train", "task=report").exit_code == 2


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_finds_no_error_and_asks_for_nothing(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    page = write_report(make_run(tmp_path))
    log = tmp_path / "net.json"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--log-net-log={log}", page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    assert "A training run" in done.stdout
    assert "CONSOLE" not in done.stderr
    assert not re.findall(r'"url":\s*"https?://', log.read_text())
