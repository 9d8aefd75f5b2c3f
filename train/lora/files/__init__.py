"""Adapters on disk ↔ the trained parameters.

    peft_files.py  PEFT's format, written and read, and the export with a name for each expert's matrices
    per_expert.py  an adapter that names each expert's w1, w2 and w3 → the factors of the experts' projections

May import train.lora, train.config, data.disk and configs.program.
"""
