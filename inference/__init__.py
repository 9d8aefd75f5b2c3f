"""Base and adapter → text, or one checkpoint.

    run.py       the program: which task
    config.py    the settings of `python -m inference`
    adapter.py   an adapter directory: what it changes, whether it fits, and the sum
    peft_layers.py  what an adapter's configuration means: the layers that stock PEFT makes of it
    unfused.py   Mixtral with a module for each expert, which older adapters name
    four_bits.py  a base in four bits, with the adapter beside it
    load.py      base and adapter → a model that is ready to generate
    prompt.py    what the user says → a conversation, or why not
    generate.py  a conversation → an answer, token by token

    chat/        a conversation in the terminal
    batch/       a file of prompts → a file of answers, which goes on after a kill
    evaluation/  the model card's table, before and after training
    card/        model cards, of an adapter and of a merged checkpoint
    merging/     base and adapter → one checkpoint, verified

May import data and configs.program; never train. `run.py` alone reaches into the rooms, by their names.
"""
