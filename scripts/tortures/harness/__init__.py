"""Small runs that are made to end badly: what they train on, how they are launched, and what must be equal after all.

    workplace.py  data, base, settings, and the run that nothing happened to
    launch.py     one launch, as typed or forked from a server that has imported torch; its processes and their ends
    outcome.py    what a run has left, and how that differs from another run
    trials.py     one trial after another, and the report of them

May import everything but the tortures themselves.
"""
