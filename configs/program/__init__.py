"""What makes a module a program: settings in, one sentence and an exit code out.

    entry.py       Hydra's YAML and the command line onto a program's dataclass; mistakes end with exit code 2
    arguments.py   what a user typed → what Hydra's grammar reads; names are taken as they stand
    jobs.py        the jobs that a command line asks for: one, or several with `--multirun`
    launch.py      what launcher and machine leave to this process
    gpus.py        NVIDIA's GPUs: why torch can't use them, and which one is this process's
    checks.py      the checks of single settings: a choice, a positive number, a share
    errors.py      `UserError`, which holds one sentence: field, value, remedy
    console.py     the one console for stderr: no markup, and a closed terminal ends nothing
    secrets.py     hides keys in all that is written
    page/          pages that open anywhere, and their charts
    provenance.py  commit, versions, machine and command, for receipts
    explanations/  what a person is told about the command line: help, what is wrong with it, how to go on

Imports nothing of ours outside itself; everything else may import it.
"""
