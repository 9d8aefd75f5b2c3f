"""A file of prompts → a file of answers.

    batch.py    the answers, padded or in continuous batches, in the input's order
    rows.py     rows of every container and schema → prompts, or why not
    journal.py  answers as they are written, so that a killed run goes on from where it was

May import inference.{load,generate,prompt,config}, data and configs.program.
"""
