"""RMSNorm against transformers' own."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from tests.support.nano import nano
from tests.support.references import NORM_TOLERANCES, check_norm
from train.model import norm


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", NORM_TOLERANCES)
def test_the_norm_and_its_gradients_are_transformers(dtype: torch.dtype, trains: bool) -> None:
    check_norm(dtype, trains, "cpu")


def test_all_norms_of_a_model_are_replaced_and_keep_their_names() -> None:
    built = nano("float32")
    norms = {name: module for name, module in built.named_modules() if isinstance(module, MixtralRMSNorm)}
    assert len(norms) == 2 * 2 + 1
    assert all(type(module) is norm.RMSNorm for module in norms.values())
    assert {f"{name}.weight" for name in norms} <= built.state_dict().keys()
