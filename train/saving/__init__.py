"""What a run leaves, and how it is resumed.

    run_directory.py   whether a directory can be used; locked, and created
    identity.py        whether it is the same run: settings, dataset and base, by hash
    receipt.py         what a run records about itself, gathered when it is launched
    starting_point.py  lora.start: sets what trains to an adapter's numbers, and measures from them
    resume.py          the newest whole checkpoint → engine, health, history
    saver.py           when what is written
    checkpoint.py      one checkpoint: complete or invisible
    result.py          the adapter, or the whole model, of one save
    whole_model.py     a model's files, one parameter at a time
    background.py      the thread that writes

May import train.engine, train.lora, train.reporting, train.history, train.health, train.config,
data.prepared, data.disk, data.template, data.card and configs.program.
"""
