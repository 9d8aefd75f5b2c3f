"""What lies on disk between the programs, and how it gets there whole.

    files.py              a file or directory that is hashed, locked, and whole or not there
    tensor_file.py        safetensors: headers, and files written tensor by tensor
    weights.py            a model directory or hub snapshot: its files and its fingerprint
    mixtral_files.py      Mixtral's names in files ↔ transformers' parameters, in both directions
    adapter_directory.py  what training hands to inference: file names, receipt, PEFT's layout of expert factors

`files.py` and `weights.py` need no torch. May import configs.program.
"""
