"""Raw rows → a prepared dataset, and what all programs share about chat and about files on disk.

    run.py         the program: prepare, preview or report
    config.py      the settings of `python -m data`
    prepare.py     the stages in order; the prepared dataset and its manifest
    schema.py      the schemas of raw rows, and the records that the stages hand on; imports nothing of ours
    template.py    the only place where conversations become ids, and where it is decided what is trained
    merges.py      the vocabulary's merges: plain text → ids
    vocabulary.py  where the vocabulary is found, how it is read, and whether it is Mixtral's
    export.py      the tokenizer's files for other programs
    card.py        what a model card says of base, data, recipe and prompt format

    rows/          where rows come from: bytes → raw rows → conversations, or rejects
    stages/        what `prepare.py` does with them
    prepared/      a prepared dataset: its layout, its batches, and how to look at it
    disk/          what lies on disk between the programs, for all three of them
    sample/        300 rows that ship with the project

May import configs.program; never train or inference.
"""
