"""Where rows come from: bytes → raw rows → `Conversation`, or a `Reject` that says why not.

    sources.py     files, each hashed, or a dataset at a commit
    repository.py  which files of a dataset of a hub, or of a folder laid out as one, are its split
    containers.py  a file's first bytes → its content unpacked, and what that is
    json_rows.py   JSON in whatever layout → the text of each row, whatever the size of the file
    tables.py      CSV, TSV, Parquet and Arrow → rows or tables
    reading.py     these → chunks of rows → rows
    texts.py       what the value of a field says
    columns.py     what the rows of a source call the fields of their schema, given or found by looking
    conversion.py  rows of three schemas → conversations, or a reject with its reason
    order.py       messages in whatever order → system, then user and assistant in turn

May import data.schema, data.template, data.config, data.disk and configs.program.
"""
