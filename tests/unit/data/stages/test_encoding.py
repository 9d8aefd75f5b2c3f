"""What is written does not depend on how many processes encode."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.config import PrepareConfig
from data.prepare import prepare
from data.rows.columns import Names
from data.rows.reading import read_file
from data.stages.encoding import BYTES_PER_WORKER, Pool, number_of_workers


def write_rows(path: Path, number: int) -> None:
    """Rows good and bad, alike and not, long and short."""
    rng = random.Random(0)
    words = [f"word{n}" for n in range(300)]
    with path.open("w") as file:
        for n in range(number):
            reply = " ".join(rng.choices(words, k=rng.randint(1, 400 if n % 50 == 0 else 40)))
            row = {"instruction": f"Question {n % (number // 2)}?", "output": "" if n % 37 == 0 else reply}
            file.write(("nonsense" if n % 41 == 0 else json.dumps(row)) + "\n")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_byte_identical_with_one_and_with_more_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("a.jsonl"), 4000)
    write_rows(Path("b.jsonl"), 800)
    (tmp_path / "eval.txt").write_text(" ".join(f"word{n}" for n in range(13)))
    for workers in (1, 2, 3):
        prepare(
            PrepareConfig(
                files=["a.jsonl", "b.jsonl"],
                output=str(workers),
                seq_len=256,
                overlong="truncate",
                duplicates="drop_near",
                contamination=["eval.txt"],
                weights={"b.jsonl": 0.5},
                workers=workers,
            )
        )
    one, two, three = (contents(tmp_path / str(workers)) for workers in (1, 2, 3))
    assert one == two == three
    reasons = json.loads(one["manifest.json"])["rows"]["rejected_by_reason"]
    assert reasons.keys() >= {"invalid_json", "empty_field", "duplicate", "left_out"}


def test_a_killed_worker_is_told(tmp_path: Path, run_program: Callable[..., Any]) -> None:
    write_rows(tmp_path / "rows.jsonl", 60_000)

    over = threading.Event()

    def kill_a_worker() -> None:
        me = psutil.Process()
        while not over.wait(0.01):
            for child in me.children(recursive=True):
                if "spawn_main" in " ".join(child.cmdline()):
                    os.kill(child.pid, signal.SIGKILL)
                    return

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    outcome = run_program("data", "files=[rows.jsonl]", "output=out", "seq_len=512", "workers=2")
    over.set()
    killer.join()
    assert outcome.exit_code == 2, outcome.stderr
    assert outcome.stderr.startswith("data: workers=2: a process was killed; look for lack of memory")
    assert not (tmp_path / "out").exists()


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """Also where the parent has no time to tell them."""
    write_rows(tmp_path / "rows.jsonl", 60_000)
    code = (
        "from data.config import PrepareConfig; from data.prepare import prepare\n"
        "if __name__ == '__main__': prepare(PrepareConfig(files=['rows.jsonl'], output='out', seq_len=512, workers=2))"
    )
    (tmp_path / "main.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    process = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    while not any("spawn_main" in " ".join(child.cmdline()) for child in children):
        assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.01)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def test_memory_is_bounded_where_one_worker_is_slow(tmp_path: Path) -> None:
    """Chunks are not read far ahead of what is written."""
    write_rows(tmp_path / "rows.jsonl", 40_000)
    config = PrepareConfig(files=["x"], seq_len=512)
    pool = Pool(config, None, workers=2)
    read = 0

    def chunks() -> Any:
        nonlocal read
        for chunk in read_file(str(tmp_path / "rows.jsonl")):
            read += 1
            yield chunk

    try:
        for written, _ in enumerate(pool.encode(chunks(), Names.of("instruction", {}))):
            assert read - written <= 17
    finally:
        pool.close()
    assert read == 40


def test_small_inputs_are_not_worth_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.stages.encoding.cores", lambda: 4)
    sizes = (0, BYTES_PER_WORKER - 1, BYTES_PER_WORKER, 3 * BYTES_PER_WORKER, 100 * BYTES_PER_WORKER)
    assert [number_of_workers(0, size) for size in sizes] == [1, 1, 2, 4, 4]
    assert number_of_workers(7, 0) == 7
