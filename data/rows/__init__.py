"""Where rows come from: bytes → raw rows → `Conversation`, or a `Reject` that says why not.

    sources.py     files, each hashed, or a hub dataset at a commit
    reading.py     bytes → chunks of rows → rows, whatever the size of the file
    conversion.py  rows of three schemas → conversations, or a reject with its reason

May import data.schema, data.template, data.config, data.disk and configs.program.
"""
