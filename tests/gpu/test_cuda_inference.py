"""Inference on CUDA. Skipped without a GPU."""

import copy
from pathlib import Path

import pytest
import torch

from data.schema import Conversation, Message
from inference.adapter import Adapter
from inference.config import InferenceConfig
from inference.generate import generate
from inference.load import fold, load
from tests.support.adapters import KINDS, make_adapter, make_base

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_the_fold_on_cuda_is_the_one_on_the_cpu(tmp_path: Path) -> None:
    """To the last bit but for sums that lie on the edge between two numbers of bfloat16."""
    base = make_base(torch.bfloat16, hidden_size=256, intermediate_size=512)
    make_adapter(tmp_path, base, **KINDS["all"])
    adapter = Adapter(tmp_path, base.config)
    on_gpu = dict(fold(copy.deepcopy(base).cuda(), adapter).named_parameters())
    for name, weight in fold(base, adapter).named_parameters():
        different = (weight != on_gpu[name].cpu()).double().mean()
        assert different <= 1e-3, name


def test_a_model_is_spread_and_answers(tmp_path: Path) -> None:
    base = make_base(torch.bfloat16, vocab_size=32_000, hidden_size=64)
    base.save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **KINDS["all"])
    config = InferenceConfig(base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), max_new_tokens=8)
    loaded = load(config)
    assert loaded.model.device.type == "cuda"
    asked = Conversation((Message("user", "Hello"),))
    on_gpu = generate(loaded, config, asked, lambda _: None)
    assert len(on_gpu.ids) == 8
    config.device, config.dtype = "cpu", "float32"
    on_cpu = generate(load(config), config, asked, lambda _: None)
    assert on_cpu.ids[0] == on_gpu.ids[0]
