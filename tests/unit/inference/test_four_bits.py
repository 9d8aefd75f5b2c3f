"""A base in four bits with an adapter beside it answers as stock PEFT does on a base of the dequantised weights."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import MixtralForCausalLM

from configs.program.errors import UserError
from data.disk import nf4
from inference.config import InferenceConfig
from inference.load import load
from tests.support.adapters import ATTENTION, KINDS, dequantised, make_adapter, make_base

IDS = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))


def asked(top: Path, **settings: object) -> InferenceConfig:
    where = {"base": str(top / "base"), "dtype": "float32", "device": "cpu", "prompt": "hello", "weights": "nf4"}
    return InferenceConfig(**where | settings)


def saved(top: Path, kind: str) -> MixtralForCausalLM:
    base = make_base(vocab_size=32_000)
    base.save_pretrained(top / "base")
    make_adapter(top / "adapter", base, **KINDS[kind])
    return base


@pytest.mark.parametrize("kind", ["all", "ranks-by-pattern", "low-rank-router", "trained-router"])
def test_it_is_stock_peft_on_the_dequantised_base(tmp_path: Path, kind: str) -> None:
    base = dequantised(saved(tmp_path, kind))
    with torch.no_grad():
        alone = base(IDS).logits
        loaded = load(asked(tmp_path)).model
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.uint8, torch.float32}
        torch.testing.assert_close(loaded(IDS).logits, alone, rtol=1e-5, atol=1e-5)
        of_peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(IDS).logits
        adapted = load(asked(tmp_path, adapter=str(tmp_path / "adapter"))).model(IDS).logits
    torch.testing.assert_close(adapted, of_peft, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, alone, atol=1e-2)


def test_a_matrix_of_the_adapters_own_is_refused(tmp_path: Path) -> None:
    base = make_base(vocab_size=32_000)
    base.save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, target_modules=ATTENTION[:2], modules_to_save=["v_proj"])
    with pytest.raises(UserError, match=r"^adapter=.*v_proj\.weight of its own, .*; use weights=bf16$"):
        load(asked(tmp_path, adapter=str(tmp_path / "adapter")))


def test_what_four_bits_can_not_be_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^weights=int8: .*bf16, nf4"):
        asked(tmp_path, weights="int8").check()
    with pytest.raises(UserError, match=r"^weights=nf4: a merged model has the 16 bits"):
        asked(tmp_path, task="merge", adapter="a", output="out", dtype="auto").check()
    saved(tmp_path, "all")
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^weights=nf4: it takes bitsandbytes"):
        load(asked(tmp_path))
