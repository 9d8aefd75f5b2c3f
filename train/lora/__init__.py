"""Expert-aware LoRA: low-rank factors on attention and on every expert, computed without the merged weight.

    attach.py         freezes the base and adds adapters: PEFT's on attention, ours on experts
    allocation.py     which expert gets an adapter, and of which rank
    factors.py        the factors of a block's experts as parameters, and their scaling
    dispatch.py       tokens sorted by expert
    products.py       matrix products over sorted rows: one expert after another, or all experts in one
    elementwise.py    what else a block computes, as operators of torch
    kernels.py        those operators in Triton, for GPUs
    quantised.py      matrices of experts in four bits, dequantised while they are multiplied with
    split_experts.py  the experts' forward and backward
    proof.py          whether every targeted expert gets a gradient, and how far each has moved

    files/            adapters on disk: PEFT's format, and one with a name for each expert's matrices

May import train.config, data.disk and configs.program.
"""
