"""Small runs that are made to end badly: what they train on, how they are launched, and what must be equal after all.

    workplace.py  data, base, settings, and the run that nothing happened to
    launch.py     one launch, as typed or forked; its processes and their ends
    forked.py     a program in a process that is forked from a server
    server.py     what that server has imported
    wire.py       two network namespaces as hosts, and a wire between them that can be bad
    disks.py      disks that are small, frozen or slow
    processes.py  what the system tells of a launch's processes
    garden.py     copies in which code is planted, and whether any was executed
    outcome.py    what a run has left, and how that differs from another run
    trials.py     one trial after another, and the report of them

May import everything but the tortures themselves.
"""
