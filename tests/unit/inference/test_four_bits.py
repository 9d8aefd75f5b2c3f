"""A base in four bits with an adapter beside it answers as stock PEFT does on a base of the dequantised weights."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError
from data.disk import nf4
from data.disk.loading.layers import quantise
from data.disk.loading.model import load_model, spread_over, whole_on
from inference import four_bits
from inference.adapter import Adapter
from inference.config import InferenceConfig
from inference.four_bits import layout
from inference.load import fold, load
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


@pytest.mark.parametrize("in_turn", [True, False])
def test_layers_go_whole_onto_gpus_that_have_room(in_turn: bool) -> None:
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=6, vocab_size=32_000)).bfloat16()
        quantise(model, "base=here")
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    whole = sum(sizes.values())
    room = [int(whole * share) for share in (0.9, 0.7)]
    devices = layout(model, room, in_turn=in_turn)
    assert devices is not None
    held = [0, 0]
    for name, size in sizes.items():
        (device,) = {device for part, device in devices.items() if f"{name}.".startswith(f"{part}.")}
        held[device] += size
    for number in range(6):  # no layer is divided
        assert f"model.layers.{number}" in devices
    assert 0 < held[1] <= room[1] and 0 < held[0] <= room[0]
    assert (max(held) > 0.65 * whole) == in_turn
    assert layout(model, [int(whole * 0.6), int(whole * 0.3)], in_turn=in_turn) is None


def test_parts_on_several_devices_are_filled_and_compute_as_one(tmp_path: Path) -> None:
    """What two GPUs do, with places that this machine has: numbers go to one of them, and both are named parts."""
    base = saved(tmp_path, "all")
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    cpu = torch.device("cpu")
    how = {"dtype": torch.float32, "device": cpu, "weights_in": "nf4"}
    whole, spread = (load_model(tmp_path / "base", base.config, "base", whole_on(cpu), **how) for _ in range(2))
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "meta"}
    halved = load_model(tmp_path / "base", base.config, "base", spread_over(places), **how)
    for name, parameter in halved.named_parameters():
        assert parameter.is_meta == name.startswith("model.layers.1.")
        assert parameter.is_meta or torch.equal(parameter, whole.get_parameter(name))
    adapter = Adapter(tmp_path / "adapter", base.config)
    for model in (whole, spread):
        four_bits.prepare(model)
    four_bits.dispatch(spread, dict.fromkeys(parts, "cpu"))
    with torch.no_grad():
        logits = [fold(m, adapter, but=four_bits.keep_apart(m, adapter))(IDS).logits for m in (whole, spread)]
    assert torch.equal(*logits)
    assert len(spread.hf_device_map) == len(parts)
