"""Runs on a base in four bits are runs on a base of the dequantised weights, however the work is divided."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

from data.disk import nf4
from scripts.tortures.harness.outcome import first_difference
from scripts.tortures.harness.workplace import Workplace
from tests.integration.conftest import Quickstart, steps, train
from train.config.lora import ATTENTION_TARGETS, EXPERT_TARGETS

pytestmark = pytest.mark.slow


def dequantised(base: Path, directory: Path) -> Path:
    """A copy of a base whose attention and experts hold what four bits leave of them."""
    model = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{target}" in name for target in (*ATTENTION_TARGETS, *EXPERT_TARGETS)):
                for matrix in parameter if parameter.dim() == 3 else (parameter,):
                    matrix.copy_(nf4.dequantised(nf4.quantised(matrix), matrix.shape, matrix.dtype))
    model.save_pretrained(directory)
    return directory


def test_two_processes_end_with_the_adapter_of_the_dequantised_base(quickstart: Quickstart, tmp_path: Path) -> None:
    base = quickstart.base_run / "model"

    def run(name: str, *overrides: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        how = ("recipe=quickstart", "model.dtype=float32", "max_steps=3", f"dataset={quickstart.sample}")
        said = train(2, *how, f"run_dir={tmp_path}/{name}", *overrides)
        assert "gemm_4bit" not in said  # bitsandbytes would warn of a kernel that nothing here uses
        losses = [step["loss"] for step in steps(tmp_path / name)]
        return losses, load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    losses, adapter = run("dequantised", f"model.path={dequantised(base, tmp_path / 'base')}")
    in_four_bits = (f"model.path={base}", "model.weights=nf4")
    for name, how in {
        "sharded": ("activation_checkpointing=full", "deepspeed.persistence_threshold=0"),
        "offloaded": ("deepspeed=zero3_offload",),
    }.items():
        losses_in_four, adapter_in_four = run(name, *in_four_bits, *how)
        assert losses_in_four == losses
        assert adapter_in_four.keys() == adapter.keys()
        assert all(torch.equal(adapter_in_four[key], tensor) for key, tensor in adapter.items())


def test_adapters_by_load_on_a_base_in_four_bits_resume_exactly(runs: Workplace) -> None:
    in_four_bits = {"model.weights": "nf4", "max_steps": "6"}
    profile = runs.scratch / "profile-in-four-bits"
    runs.launch(profile, 2, **in_four_bits, task="profile").wait()
    load = profile / "expert_load.json"
    by_load = in_four_bits | {"lora": "by_load", "lora.load": str(load), "lora.budget": "10000"}
    run = runs.interrupted("stopped-in-four-bits", 3, 2, **by_load)
    runs.finish(run, 2, **by_load)
    whole = runs.scratch / "whole-in-four-bits"
    runs.finish(whole, 2, **by_load)
    assert first_difference(run, whole) is None
    base = json.loads((run / "receipt.json").read_text())["base"]
    assert base["weights"] == "nf4"
