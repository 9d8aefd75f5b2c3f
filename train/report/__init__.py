"""What a run was and what became of it, on one page.

    recorded.py      a run directory → what it recorded
    shapes.py        what is relied on in files that others wrote
    answers.py       prompts → the answers of base and tuned model, by the inference program
    report.py        all of it → report.html
    report.html.j2   the page
    prompts.jsonl    what is asked if nobody says otherwise

May import train.run_files, train.config, data and configs.program: it reads a run's files and knows nothing of how
they came to be.
"""
