"""A loaded model is the one that transformers loads, in all that it holds."""

import copy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError
from data.disk.loading import progress
from data.disk.loading.model import load_model, whole_on
from data.disk.mixtral_files import load_mixtral
from tests.support.stored import CONFIG, saved

CPU = torch.device("cpu")


def load(directory: Path, architecture: MixtralConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(directory, architecture, "base=here", whole_on(CPU), dtype=dtype, device=CPU)


def same(ours: MixtralForCausalLM, theirs: MixtralForCausalLM) -> None:
    """Asserts it of parameters, buffers, which of them are one, and settings."""
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(ours, kind)(remove_duplicate=False))
        other = dict(getattr(theirs, kind)(remove_duplicate=False))
        assert list(mine) == list(other)
        assert all(
            torch.equal(mine[name], tensor) and mine[name].dtype == tensor.dtype for name, tensor in other.items()
        )
        assert all(mine[name].requires_grad == tensor.requires_grad for name, tensor in other.items())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (
        theirs.lm_head.weight is theirs.model.embed_tokens.weight
    )
    assert ours.training == theirs.training
    assert ours.name_or_path == theirs.name_or_path
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert ours.config._experts_implementation == theirs.config._experts_implementation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_is_what_transformers_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    saved(tmp_path, torch.float32)
    before = CONFIG.to_dict()
    ours, theirs = load(tmp_path, dtype=dtype), load_mixtral(tmp_path, CONFIG, "base=here", dtype=dtype)
    same(ours, theirs)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert CONFIG.to_dict() == before
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert files[0] == files[1]
    ids = torch.tensor([[1, 2, 3, 4]])
    for model in (ours, theirs):
        model.set_experts_implementation("eager")  # torch's grouped product takes no such odd sizes
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("head", ["none", "the embedding", "another"])
def test_a_head_that_is_the_embedding_is_one_tensor_with_it(tmp_path: Path, head: str) -> None:
    tied = copy.deepcopy(CONFIG)
    tied.tie_word_embeddings = True
    saved(tmp_path, torch.float32)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    del stored["lm_head.weight"]
    if head != "none":
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone() + (head == "another")
    save_file(stored, file, metadata={"format": "pt"})
    ours, theirs = load(tmp_path, tied), load_mixtral(tmp_path, tied, "base=here", dtype=torch.float32)
    same(ours, theirs)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (head != "another")


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, torch.float32)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^base=here: beside its weights lies an adapter_config\.json"):
        load(tmp_path)


def test_a_terminal_sees_how_fast_a_base_is_read_and_a_log_how_much_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal, said in ((True, "GB/s"), (False, "Reading the base: 93.4 GB")):
        shown = StringIO()
        monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=is_terminal, width=100))
        with progress.progress("Reading the base", 93_400_000_000, shown=True) as advance:
            advance(1 << 30)
        assert said in shown.getvalue()
    with progress.progress("Reading the base", 93_400_000_000, shown=False):
        assert shown.getvalue().count("Reading the base") == 1


def test_a_log_hears_now_and_then_how_far_a_read_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, seconds = StringIO(), iter([0.0, 59.0, 61.0, 70.0, 122.0])
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=False, width=100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with progress.progress("Reading the base", 93_400_000_000, shown=True) as advance:
        for _ in range(3):
            advance(10_000_000_000)
        monkeypatch.setattr(progress.time, "monotonic", lambda: 200.0)
        advance(10_000_000_000)
    of = [f"Reading the base: {done} of 93.4 GB" for done in ("20.0", "40.0")]
    assert shown.getvalue().splitlines() == ["Reading the base: 93.4 GB", *of]
