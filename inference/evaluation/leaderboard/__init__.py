"""The six tasks of the card's table, with the prompts that the Open LLM Leaderboard (v1) used.

    tasks.py       the six tasks: where their rows are, and what was published
    hashes.json    the leaderboard's hashes of its prompts
    rows.py        files or the hub → a task's rows
    questions.py   rows → questions

May import data.rows, data.stages.leaderboard, data.disk and configs.program.
"""
