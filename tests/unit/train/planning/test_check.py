"""The check before a real run: what it compares, and what it leaves for the receipt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.planning.given import here

NANO = ("model=nano", "lora=none", "dataset=rows", "run_dir=run", "deepspeed=none")


@pytest.fixture
def rows(run_program: Callable[..., Any], project_root: Path) -> None:
    files = project_root / "data" / "sample" / "identity.jsonl"
    assert run_program("data", f"files=[{files}]", "output=rows", "seq_len=256", "eval_fraction=0").exit_code == 0


@pytest.mark.usefixtures("rows")
def test_a_run_that_can_not_fit_ends_before_anything_is_loaded(
    run_program: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9999999 kB\nMemAvailable: 500000 kB\n")
    monkeypatch.setattr(here, "MEMINFO", meminfo)
    outcome = run_program("train", *NANO)
    assert outcome.exit_code == 2
    assert len(outcome.stderr.splitlines()) == 1
    for said in ("micro_batch=1: ", "0.5 GB of this machine are free", "task=plan", "plan.check=false"):
        assert said in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_what_the_kernel_keeps_of_files_counts_as_free(tmp_path: Path) -> None:
    """Of a job within a container, the closer bound; files that were read don't make a run be refused."""
    own, job = tmp_path / "own", tmp_path / "groups" / "box" / "job"
    own.write_text("0::/box/job\n")
    for folder, bound, taken in ((job.parent, "9000000000", 5_000_000_000), (job, "6000000000", 4_000_000_000)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{bound}\n")
        (folder / "memory.current").write_text(f"{taken}\n")
        (folder / "memory.stat").write_text("anon 1\nactive_file 1000000000\ninactive_file 2000000000\n")
    assert list(here._left_in_groups(tmp_path / "groups", own)) == [5e9, 7e9]
    (job / "memory.max").write_text("max\n")
    assert list(here._left_in_groups(tmp_path / "groups", own)) == [7e9]
