"""Base and adapter → one checkpoint, from file to file, which takes its name when it is verified.

    merge.py   copies what the adapter leaves alone, and folds and writes what it changes
    verify.py  whether the result is base + adapter: its tensors bit by bit, its logits against stock PEFT's
    card.py    its model card
    scores.py  what an evaluation beside the adapter measured, for the card

May import inference.load, inference.adapter, inference.config, the tasks' table of inference.evaluation, data and
configs.program.
"""
