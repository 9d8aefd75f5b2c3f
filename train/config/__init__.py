"""Every setting of `python -m train`, with its default, its docstring and its checks. The ground floor of train/.

    train.py      TrainConfig, the groups logging and failures, and the batch arithmetic
    model.py      the base: where it is, or the sizes of a random one
    lora.py       which parameters train
    engine.py     optimizer, ZeRO and hardware
    cluster.py    the machine that a plan is for, and what a plan assumes
    catalogue.py  the clusters of configs/cluster/, by the names of their GPUs

May import configs.program.
"""
