"""A Mixtral's files → a model in memory, of which a process may hold a part.

    parameters.py  any numbers of any parameter, read from where they lie in the files
    four_bits.py   any bytes of any parameter in four bits, quantised from where the weights lie
    layers.py      linear layers that hold four bits, and a model made to consist of them
    model.py       transformers' model without numbers, and each parameter filled in the memory that it is given
    progress.py    how far a read of many gigabytes is, as a bar or a line

May import data.disk and configs.program.
"""
