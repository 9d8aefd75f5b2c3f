"""The card's table: scores of a model, before and after training, with the leaderboard's own prompts.

    leaderboard/      the six tasks: rows and prompts
    sequences.py      questions → ids, packed so that what they share is read once
    scoring.py        ids → log-likelihoods
    answering.py      questions → answers, and what each is worth
    journal.py        the answers so far, on the disk
    statistics.py     scores → means, errors, comparisons in pairs
    contamination.py  which questions were trained on
    results.py        answers → what is written, and read again
    harness.py        any other task, by lm-eval
    tables.py         the result on the screen
    evaluate.py       the task itself

May import inference.{load,generate,config}, data and configs.program.
"""
