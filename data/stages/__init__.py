"""What `data/prepare.py` does with rows, in this order.

    encoding.py       chunks → encoded conversations, in several processes, in the order of the rows
    contamination.py  rejects what shares text with evaluation data
    leaderboard.py    the tasks of the Open LLM Leaderboard, which are such data: where the hub keeps them
    overlong.py       what is kept of a conversation that is longer than a row
    duplicates.py     finds conversations that were there before, or nearly the same ones
    intake.py         keeps each encoded conversation in the store, or rejects it; the counts
    store.py          encoded conversations on disk, until they are packed
    splitting.py      which rows are held out
    packing.py        conversations → full rows
    writing.py        rows → a dataset that is whole or not there

May import data.rows, data.prepared.layout and places, data.schema, data.template, data.config, data.disk and
configs.program.
"""
