"""However the work is divided, the numbers are the same; and they are those of a plain loop that nobody divided."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import MixtralForCausalLM

from data.prepared.dataset import PreparedDataset, Schedule
from data.schema import IGNORE_INDEX
from tests.integration.conftest import Quickstart, evaluations, steps, train
from tests.integration.conftest import run as command
from train.config.engine import OptimConfig
from train.loop import learning_rate

pytestmark = pytest.mark.slow

STEPS = 6


def losses(run_dir: Path) -> list[float]:
    found = [step["loss"] for step in steps(run_dir)]
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_base"], ids=["lora", "full"])
def test_processes_micro_batches_and_zero_stages_do_not_change_the_losses(
    quickstart: Quickstart, tmp_path: Path, recipe: str
) -> None:
    # As large models are stored: in several files, which ZeRO-3 reads on one process and deals out.
    sharded = tmp_path / "sharded"
    MixtralForCausalLM.from_pretrained(quickstart.base_run / "model").save_pretrained(sharded, max_shard_size="1MB")
    assert len(list(sharded.glob("*.safetensors"))) > 3

    def run(name: str, processes: int, *overrides: str) -> list[float]:
        start = f"model.path={sharded if processes == 2 else quickstart.base_run / 'model'}"
        how = ("model.dtype=float32", f"max_steps={STEPS}", "global_batch=2", "micro_batch=1", start)
        where = (f"dataset={quickstart.sample}", f"run_dir={tmp_path}/{name}")
        train(processes, f"recipe={recipe}", *how, *where, *overrides)
        return losses(tmp_path / name)

    # 2 processes × 1 micro-batch, 1 process × 2 micro-batches, one process without ZeRO
    two = run("two", 2)
    one = run("one", 1)
    without_zero = run("without", 1, "deepspeed=none")
    assert two == pytest.approx(one, rel=1e-5)
    assert one == pytest.approx(without_zero, rel=1e-5)
    held_out = [evaluations(tmp_path / name) for name in ("two", "one", "without")]
    assert [losses[STEPS] for losses in held_out] == pytest.approx([held_out[0][STEPS]] * 3, rel=1e-5)
    # And they did train, so equal losses say something.
    assert abs(held_out[0][STEPS] - held_out[0][0]) > 0.01
    for name in ("two", "one", "without"):
        assert all(step["gradient_norm"] > 0 for step in steps(tmp_path / name))
    if recipe == "quickstart":
        more = {stage: [f"deepspeed={stage}"] for stage in ("zero3_offload", "zero2", "none")}
        # Attention, adapters and routers whole everywhere, as in the full recipe; a block ahead; little at once.
        more["persistent"] = ["deepspeed.persistence_threshold=30000", "activation_checkpointing=full"]
        more["ahead"] = ["deepspeed.max_live_parameters=4000000000", "deepspeed.prefetch_bucket_size=1000"]
        more["ahead"] += ["activation_checkpointing=attention"]
        for name, how in more.items():
            assert run(name, 2, *how) == pytest.approx(two, rel=1e-5)


def test_a_copy_of_the_shards_on_each_node_changes_no_loss(quickstart: Quickstart, tmp_path: Path) -> None:
    """Four processes that take themselves to be on two nodes."""
    start = (f"model.path={quickstart.base_run}/model", f"dataset={quickstart.sample}", "recipe=quickstart")
    how = (*start, "model.dtype=float32", "global_batch=4", "optim.lr=1e-3", "eval_every=2", "max_steps=4")
    recipe = ("deepspeed.persistence_threshold=30000", "activation_checkpointing=attention")
    train(4, *how, f"run_dir={tmp_path}/plain")
    train(4, *how, *recipe, "deepspeed.node_copy=true", f"run_dir={tmp_path}/copied", nodes=2)
    plain, copied = ([step["loss"] for step in steps(tmp_path / name)] for name in ("plain", "copied"))
    assert len(plain) == 4
    assert copied == pytest.approx(plain, rel=1e-6)
    held_out = [evaluations(tmp_path / name) for name in ("plain", "copied")]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-6)


def test_in_bfloat16_the_first_steps_without_zero_are_those_of_zero3(quickstart: Quickstart, tmp_path: Path) -> None:
    """DeepSpeed's stage 0 takes a step of its own before training: were it counted, the first real ones would differ.

    In bfloat16 the two round differently, so the tolerance is wide; the counted step moved the losses by 4 %.
    """
    start = (f"model.path={quickstart.base_run}/model", f"dataset={quickstart.sample}", "max_steps=4")
    train(1, "recipe=quickstart", f"run_dir={tmp_path}/zero3", *start)
    train(1, "recipe=quickstart", f"run_dir={tmp_path}/none", "deepspeed=none", *start)
    zero3, none = ([step["loss"] for step in steps(tmp_path / name)] for name in ("zero3", "none"))
    assert none == pytest.approx(zero3, rel=2e-3)


def test_a_plain_loop_gives_the_same_losses(quickstart: Quickstart, tmp_path: Path) -> None:
    """A second implementation: stock transformers, each conversation alone, torch's AdamW; no packing, no DeepSpeed.

    At a tenth of the recipe's rate: at the whole of it the two drift apart by rounding alone, as a token whose router
    stands between two experts falls to either side.
    """
    start, lr = quickstart.base_run / "model", 3e-4
    numbers = ("model.dtype=float32", f"optim.lr={lr}", "optim.clip=0.5", "router_aux_loss=0")
    how = (*numbers, f"max_steps={STEPS}", "global_batch=3")
    where = (f"model.path={start}", f"dataset={quickstart.general}", f"run_dir={tmp_path}/run")
    train(1, "recipe=quickstart_base", *how, *where)

    table = PreparedDataset(quickstart.general).train
    schedule = Schedule(len(table), epochs=3, rows_per_step=3, seed=0)
    config = OptimConfig(lr=lr, warmup_fraction=0.1)
    model = MixtralForCausalLM.from_pretrained(start, dtype=torch.float32, experts_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    expected = []
    for step in range(STEPS):
        total, supervised = torch.zeros(()), 0
        for index in schedule.rows_of(step):
            assert index is not None
            row, begin = table[index], 0
            for length in row.lengths:
                ids = torch.tensor(row.ids[begin : begin + length])
                labels = torch.tensor(row.labels[begin : begin + length])
                logits = model(ids[None]).logits[0]
                total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
                supervised += int((labels != IGNORE_INDEX).sum())
                begin += length
        loss = total / supervised
        expected.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate(step + 1, STEPS, config)
        optimizer.step()
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [(2, ()), (1, ("deepspeed=none", "model.dtype=float32"))],
    ids=["zero3-bfloat16-two-processes", "no-zero-float32"],
)
def test_a_step_with_a_value_that_is_not_finite_is_refused_everywhere(
    quickstart: Quickstart, tmp_path: Path, processes: int, overrides: tuple[str, ...]
) -> None:
    """A base with one embedding that is NaN: the steps that meet its token change nothing, the others train."""
    table = PreparedDataset(quickstart.sample).train
    schedule = Schedule(len(table), epochs=3, rows_per_step=2, seed=0)
    taken = [
        {token for index in schedule.rows_of(step) if index is not None for token in table[index].ids}
        for step in range(6)
    ]
    bad_step = 3
    only_there = taken[bad_step] - set().union(*(tokens for step, tokens in enumerate(taken) if step != bad_step))
    poisoned = tmp_path / "base"
    poisoned.mkdir()
    for file in (quickstart.base_run / "model").iterdir():
        (poisoned / file.name).write_bytes(file.read_bytes())
    weights = load_file(poisoned / "model.safetensors")
    weights["model.embed_tokens.weight"][min(only_there)] = float("nan")
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})

    where = (f"model.path={poisoned}", f"dataset={quickstart.sample}", f"run_dir={tmp_path}/run")
    said = train(processes, "recipe=quickstart", "max_steps=6", "global_batch=2", *where, *overrides)
    assert [step["applied"] for step in steps(tmp_path / "run")] == [True, True, True, False, True, True]
    assert "step 4: loss or gradient not finite, the update was skipped" in said
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter.values())


def test_a_mistake_in_a_launch_of_two_is_told_once_and_ends_with_2(tmp_path: Path) -> None:
    where = (f"dataset={tmp_path}/nothing", f"run_dir={tmp_path}/run")
    said = train(2, "recipe=quickstart", *where, expect=2, forked=False)
    told = [line for line in said.splitlines() if line.startswith("train: ")]
    assert told == [
        f"train: dataset={tmp_path}/nothing: there is no prepared dataset there; make one with `python -m data`, whose "
        f"setting output names the directory"
    ]
    assert "Traceback" not in said


def test_the_full_recipe_is_planned_without_weights() -> None:
    run = "import resource, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=False); "
    run += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
    done = command(sys.executable, "-c", run, "-m", "train", "recipe=openhermes_mixtral_8x7b", "dry_run=true")
    assert int(done.stderr.split()[-1]) < 4 * 2**20  # KiB
    shown = done.stdout
    assert "46,702,792,704" in shown
    assert "micro-batch 1 × accumulation 4 × processes 8 = 32 rows per step" in shown
    attention = 32 * 16 * ((4096 + 4096) * 2 + (4096 + 1024) * 2)  # q and o, k and v: rank × (in + out)
    experts = 32 * 8 * 16 * ((4096 + 2 * 14336) + (14336 + 4096))
    assert f"attention          {attention:,}" in shown
    assert f"experts            {experts:,}" in shown
    settings = json.loads(shown[shown.index("{") :])
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["stage3_param_persistence_threshold"] == 20_000_000
    assert settings["zero_optimization"]["stage3_max_live_parameters"] == 4_000_000_000
    assert settings["zero_optimization"]["overlap_comm"]  # as on the GPUs that it is for
    assert settings["train_batch_size"] == 32
