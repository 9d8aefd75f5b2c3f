"""Model cards: what was recorded of base, data, recipe and licence, and what an evaluation measured.

    card.py    the task: the card of an adapter
    merged.py  the card of a merged checkpoint
    scores.py  what an evaluation beside the adapter measured

What both cards say of base, data, recipe and prompt format is made by data.card, with which training writes the first
card of an adapter. May import inference.load, inference.adapter, inference.config, the tasks' table of
inference.evaluation, data and configs.program.
"""
