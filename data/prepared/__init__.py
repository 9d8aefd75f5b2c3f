"""A prepared dataset: what it is on disk, how it becomes batches, and how to look at it.

    layout.py       names, columns and manifest; needs no torch
    whole.py        its rows, checked before one of them is read
    dataset.py      rows → the micro-batches of a step, the same on any number of processes
    places.py       file, and line or item, of each row that went in; needs no torch
    selection.py    which rows preview and report show
    preview.py      rows token by token, as the model sees them
    report.py       a page about a prepared dataset; report.html.j2 is its template

May import data.schema, data.template, data.config, data.disk and configs.program.
"""
