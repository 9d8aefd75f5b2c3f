"""Where rows come from: bytes → raw rows → `Conversation`, or a `Reject` that says why not.

    sources.py     files, each hashed, or a dataset at a commit
    repository.py  which files of a dataset of a hub, or of a folder laid out as one, are its split
    reading.py     bytes → chunks of rows → rows, whatever the size of the file
    tables.py      CSV, TSV and Arrow files → chunks of rows
    columns.py     what the rows of a source call the fields of their schema
    conversion.py  rows of three schemas → conversations, or a reject with its reason

May import data.schema, data.template, data.config, data.disk and configs.program.
"""
