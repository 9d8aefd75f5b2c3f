"""Mixtral from ids to losses.

    mixtral.py        the base, random or pretrained, with adapters attached
    attention.py      attention of packed rows: each conversation sees itself alone
    projections.py    attention's projections and their adapters, with few passes
    rotary.py         rotary embedding, in one pass on CUDA
    norm.py           RMSNorm, in one pass on CUDA
    head.py           the head and its cross-entropy, in chunks of positions
    routing.py        what the routers do: expert load, entropy, auxiliary loss
    loss.py           all of it in one forward: ids → cross-entropy and the routers' loss
    work.py           the floating-point operations that a step must do
    recomputation.py  a layer's two halves, and which of them is computed again in the backward

May import train.lora, train.config, data.schema, data.disk and configs.program.
"""
