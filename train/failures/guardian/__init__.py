"""The program beside each training process: it outlives what happens to that process, and tells the others.

    process 0 ── guardian 0 (hub) ──┬── guardian 1 ── process 1
                                    └── guardian 2 ── process 2

    channel.py   lines of JSON between processes, the page of memory with step and phase, the bounds in seconds
    guardian.py  watches one process, gives it the verdict, and ends it if it does not leave
    spoke.py     guardian 1 and the others: they report to guardian 0 and hear its verdict
    judge.py     guardian 0: hears of all processes and judges
    __main__.py  the program

Imports the standard library and itself alone: it is started without site-packages, so that it is there in a few
hundredths of a second and takes little memory.
"""
