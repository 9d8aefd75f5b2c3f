"""A Mixtral's files → a model in memory, of which a process may hold a part.

    parameters.py  any numbers of any parameter, read from where they lie in the files
    model.py       transformers' model without numbers, and each parameter filled in the place that it is given

May import data.disk and configs.program.
"""
