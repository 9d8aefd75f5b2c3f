"""What lies on disk between the programs, and how it gets there whole.

    files.py              a file or directory that is hashed, locked, and whole or not there
    tensor_file.py        safetensors: headers, and files written tensor by tensor
    weights.py            a model directory or hub snapshot: its files and its fingerprint
    architecture.py       is there a Mixtral? its config.json, read without code of its own
    mixtral_files.py      Mixtral's names in files ↔ transformers' parameters, in both directions
    nf4.py                a Mixtral's weights in four bits, as training and inference hold them in memory
    adapter_directory.py  the contract train → inference: file names, PEFT's settings and its layout of expert factors
    plain_text.py         JSON and text that only describe, read as far as they can be
    hub.py                a hub's repository at a commit, its files in the cache
    hub_refusals.py       what a hub refuses, in one sentence

    formats/              one reader for each format, by which all of these files are read
    loading/              a Mixtral's files → a model, of which a process may hold a part

`files.py` needs no torch. May import configs.program.
"""
