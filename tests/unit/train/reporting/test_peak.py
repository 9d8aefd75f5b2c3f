"""The peaks of GPUs, by the names that torch gives them."""

import pytest
import torch

from train.reporting.peak import peak_flops, peak_of


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 5090", 210),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, teraflops: float) -> None:
    assert peak_of(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10", "NVIDIA L40", "NVIDIA GeForce RTX 5090 D", ""]
)
def test_of_others_nothing_is_said(name: str) -> None:
    assert peak_of(name) is None


def test_a_cpu_has_none() -> None:
    assert peak_flops(torch.device("cpu"), "bfloat16", 1) is None
