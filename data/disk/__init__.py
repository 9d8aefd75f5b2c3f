"""What lies on disk between the programs, and how it gets there whole.

    files.py              a file or directory that is hashed, locked, and whole or not there
    tensor_file.py        safetensors: headers, and files written tensor by tensor
    weights.py            a model directory or hub snapshot: its files and its fingerprint
    mixtral_files.py      Mixtral's names in files ↔ transformers' parameters, in both directions
    adapter_directory.py  what training hands to inference: file names, receipt, PEFT's layout of expert factors
    architecture.py       a base's config.json: read without any code of the base's own, or refused
    plain_text.py         JSON and text that others wrote, read with care
    hub.py                a hub's repository at a commit, its files in the cache
    hub_refusals.py       what a hub refuses, in one sentence

`files.py` and `weights.py` need no torch. May import configs.program.
"""
