"""Base and adapter → one checkpoint, from file to file, which takes its name when it is verified.

    merge.py   copies what the adapter leaves alone, and folds and writes what it changes
    verify.py  whether the result is base + adapter: its tensors bit by bit, its logits against stock PEFT's

May import inference.card, inference.load, inference.adapter, inference.config, data and configs.program.
"""
