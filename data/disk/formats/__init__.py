"""One reader for each format of file that others may have made, damaged or hostile: what it can't be is refused in a
sentence, before anything is computed with it.

    regular.py     bytes of a regular file, no more than were asked for
    sizes.py       how large a file of each kind may be
    json_text.py   JSON → plain values of a declared shape
    arrow_file.py  a table of an Arrow file, mapped into memory, whose buffers are what its schema says
    time_limit.py  a limit on what a library computes from a file

The heads of safetensors files are read by `data/disk/tensor_file.py`, cards by `data/disk/plain_text.py`. No torch.
May import configs.program.
"""
