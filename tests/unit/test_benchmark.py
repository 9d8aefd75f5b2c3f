"""What scripts/benchmark.py counts as work that must be done, against what torch counts in our step; what it calls
failed; and that each benchmark runs, at its smallest (those that train, and `experts`, in tests/integration)."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.program.errors import UserError
from data.schema import IGNORE_INDEX
from tests.support.counting import OF_MATRICES, counted_work
from tests.support.leaderboard import write_rows
from tests.support.nano import LENGTHS, losses, nano, packed
from train.lora import attach
from train.model import work
from train.model.loss import MixtralWithLoss

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import step

    yield step
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_a_step_does_what_must_be_done_and_the_adapters_work_and_nothing_else(step) -> None:
    """So no frozen weight gets a gradient, and the head sees supervised positions alone. Attention's own products are
    left out: its blocks hold a few pairs that no conversation sees."""
    causal_lm = nano("float32").train()
    config = causal_lm.config
    batch = packed(torch.randint(3, 400, (sum(LENGTHS),)))
    module = MixtralWithLoss(causal_lm, with_router_loss=True)

    def once() -> None:
        losses(module, batch)[0].backward()

    counted = counted_work(once)
    matrices = sum(flops for op, flops in counted.items() if op in OF_MATRICES)
    assert counted.keys() == {*OF_MATRICES, "aten.bmm", "aten.baddbmm"}

    hidden, width, inner, rank = config.hidden_size, config.head_dim or 16, config.intermediate_size, 4
    layers, heads, key_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    tokens = batch.ids.numel()  # padding is computed as well
    supervised = int((batch.targets != IGNORE_INDEX).sum())
    needed = step.needed_flops(config.to_dict(), [tokens], supervised)
    needed -= layers * 3 * 2 * 2 * width * heads * tokens * (tokens + 1) / 2

    # A and B of each adapter: forward, input gradient, and their own gradient
    on_attention = 2 * (hidden + heads * width) + 2 * (hidden + key_heads * width)  # q and o, k and v
    on_experts = config.num_experts_per_tok * ((hidden + 2 * inner) + (inner + hidden))
    adapters = 3 * 2 * tokens * rank * layers * (on_attention + on_experts)
    adapters -= 2 * tokens * rank * 3 * hidden  # the first layer's input is frozen embeddings: q, k and v need no more
    assert matrices == needed + adapters
    trained = {name: tuple(parameter.shape) for name, parameter in attach.trainable(causal_lm)}
    assert work.of_training(config.to_dict(), trained).flops(tokens, 0, supervised) == matrices


@pytest.mark.parametrize(
    ("ours", "theirs", "failed"),
    [(2.0, 2.0, 0), (2.00019, 2.0, 0), (2.00021, 2.0, 1), (1.99, 2.0, 1), (float("nan"), 2.0, 1)],
)
def test_trainers_whose_first_losses_differ_fail(step, ours: float, theirs: float, failed: int) -> None:
    options = argparse.Namespace(row=1024, lora_rank=16, experts=8)
    sentences = step.disagreement({"ours": ours, "trl": theirs}, options)
    assert len(sentences) == failed
    assert all("the first loss is" in sentence and "--row 1024" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("model", "drawn"), [(None, {"experts", "lora_rank", "row"}), (Path("base"), {"lora_rank", "row"})]
)
def test_curves_tell_what_failed_and_leave_a_given_models_sizes(
    step, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path | None, drawn: set[str]
) -> None:
    both = {"ours": 2.0, "trl": 1.0}
    names = ("tokens_per_second", "speedup", "memory_above_model_mib", "memory_ratio", "share_of_peak")
    here = dict.fromkeys(names, both) | {"failed": []}

    def compare(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
        return here | {"failed": ["a sentence"] if options.row == 512 else []}

    monkeypatch.setattr(step, "_compare", compare)
    options = argparse.Namespace(row=1024, lora_rank=16, experts=8, model=model)
    curves = step._curves(options, tmp_path, here)
    assert curves.keys() == drawn
    assert here["failed"] == ["a sentence"]
    step._draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


def measured(tmp_path: Path, name: str, *options: str) -> dict[str, Any]:
    """The figures of `python scripts/benchmark.py NAME …`, typed in another folder."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), name, *options, "--json", str(figures)]
    # In its own folder a module of the benchmarks would hide the package of the same name.
    done = subprocess.run(command, cwd=SCRIPTS / "benchmarks", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(figures.read_text())
    assert record["benchmark"] == name
    return dict(record["figures"])


SAMPLE = ("--files", str(SCRIPTS.parent / "data" / "sample" / "identity.jsonl"))
SMALL = ("--hidden", "64", "--intermediate", "96", "--layers", "1", "--rank", "2", "--rounds", "1")


def test_merge_measures_every_contender(tmp_path: Path) -> None:
    figures = measured(tmp_path, "merge", *SMALL, "--shard", "3MB")
    assert all(figures[name]["gigabytes_per_second"] > 0 for name in ("copy", "ours", "peft"))


def test_load_measures_every_contender_and_each_process_reads_its_share(tmp_path: Path) -> None:
    figures = measured(tmp_path, "load", "--hidden", "128", "--intermediate", "96", "--layers", "1")
    assert len(figures["ours"]) == len(figures["transformers"]) == 2
    for process in figures["ours"]:
        assert process["share"] <= process["read"] <= process["share"] + 200_000  # headers, config.json
    shares = [process["share"] for of_one in ("ours", "transformers") for process in figures[of_one]]
    assert len(set(shares)) == 1
    assert 0 <= figures["bytes"] - 2 * shares[0] < 50_000  # the headers


def test_generate_measures_every_contender(tmp_path: Path) -> None:
    figures = measured(tmp_path, "generate", *SMALL, "--peft-rounds", "1", "--prompts", "2", "--device", "cpu")
    contenders = {"ours", "transformers, merged", "PEFT, unmerged"}
    assert figures["streams_1"].keys() == figures["streams_16"].keys() == contenders
    assert figures["batches"].keys() == {"padded", "continuous"}


def test_evaluate_measures_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install -e '.[eval]'")
    sizes = ("--hidden", "64", "--intermediate", "64", "--layers", "1", "--rounds", "1", "--questions", "2")
    rows = write_rows(tmp_path / "rows")
    figures = measured(tmp_path, "evaluate", *sizes, "--data", str(rows), "--tasks", "arc", "truthfulqa")
    assert figures["tasks"].keys() == {"arc", "truthfulqa"}
    for task in figures["tasks"].values():
        assert task["largest_difference"] < 1e-3
        assert all(min(speeds) > 0 for speeds in task["questions_per_second"].values())


def test_data_measures_every_side(tmp_path: Path) -> None:
    figures = measured(tmp_path, "data", *SAMPLE, "--rows", "0", "--growth", "--workers", "1", "--repeats", "1")
    assert figures["distinct"]["seconds"].keys() == {"ours", "floor", "trl"}
    assert figures["distinct"]["rows"] == 12


def test_data_memory_measures(tmp_path: Path) -> None:
    figures = measured(tmp_path, "data_memory", "--rows", "20", "--workers", "1")
    assert figures["rows"] == 20


def test_a_layer_moves_less_beside_its_products_than_was_asked_for(tmp_path: Path) -> None:
    """At Mixtral's size, 4,096 tokens, no checkpointing; no GPU is needed for that."""
    figures = measured(tmp_path, "traffic")
    assert figures["beside_products_gigabytes"] <= 4
    of_products = figures["forward"]["products"]["tflop"] + figures["backward"]["products"]["tflop"]
    hidden, inner, tokens = 4096, 14336, 4096
    on_attention = 2 * tokens * hidden * 2 * (hidden + 1024)  # q and o, k and v
    frozen = 2 * (2 * tokens * 2 * 3 * hidden * inner + on_attention)
    assert 1 <= of_products * 1e12 / frozen <= 1.2  # the scores of attention, the router and the adapters on top


def test_plan_measures_what_it_planned(tmp_path: Path) -> None:
    rows = ("--data", SAMPLE[1], "--sizes", "nano", "--draw", "0", "--steps", "2")
    figures = measured(tmp_path, "plan", *rows, "--minutes", "0.001")
    (setting,) = figures["settings"]
    assert figures["left"] == 1
    assert min(setting["planned_memory"], setting["measured_memory"], setting["planned_seconds"]) > 0


def test_plan_recipes_plans_and_draws(step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import plan_recipes

    (name, settings), *_ = plan_recipes.PLANS.items()
    monkeypatch.setattr(plan_recipes, "PLANS", {name: settings})
    assert plan_recipes.run(argparse.Namespace(picture=tmp_path / "plans.png"))[name]["fits"]
    assert (tmp_path / "plans.png").is_file()


def test_gpu_leaves_out_what_it_has_no_time_for(step) -> None:
    from benchmarks import gpu

    parser = argparse.ArgumentParser()
    gpu.arguments(parser)
    figures = gpu.run(parser.parse_args(["--device", "cpu", "--minutes", "0"]))
    for part in ("tests", "ways", "block", "step", "generate", "zero3"):
        assert figures[part]["left_out"].endswith("are left"), part


def test_gpu_kills_what_a_part_that_takes_too_long_has_started(step, tmp_path: Path) -> None:
    """On a GPU it would keep the memory from the parts that follow."""
    from benchmarks.gpu import finished

    started = tmp_path / "started"
    with pytest.raises(subprocess.TimeoutExpired):
        finished(["bash", "-c", f"sleep 600 & echo $! > {started}; wait"], 3)
    state = Path(f"/proc/{started.read_text().strip()}/stat")
    until = time.monotonic() + 30
    while state.exists() and state.read_text().split()[2] != "Z":  # killed, and perhaps not yet buried
        assert time.monotonic() < until
        time.sleep(0.05)


def test_gpu_keeps_its_minutes_while_it_prepares_rows(step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu

    options = argparse.Namespace(data="data/sample/identity.jsonl", minutes=0.5)
    monkeypatch.setattr(gpu, "RESERVE", 29.99)
    with pytest.raises(UserError, match=r"^--minutes=0\.5: preparing rows takes longer; give more$"):
        gpu.prepare(options, 128, str(tmp_path), gpu.Minutes(options.minutes))
