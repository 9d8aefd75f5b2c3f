"""What `scripts/torture.py` does to training runs, a module each. All compare with a run that nothing happened to.

    kill.py     SIGKILL at random points, and resuming, until each run is finished
    signals.py  SIGTERM and SIGINT to one process, to all, to what started them
    peers.py    one of two processes killed or stopped, in every phase
    network.py  a bad network between two hosts, and one that is gone
    damage.py   every file of a checkpoint damaged in every way
    disk.py     a disk that gets full, turns read-only, hangs or is slow
    files.py    every file that the three programs read damaged in every way
    long.py     a run of twenty thousand steps, in which nothing may grow
    size.py     a large base and a large checkpoint, in bounded memory
    planted.py  code planted in all that the programs read

    harness/    the small runs that these are done to
    hostile/    what files.py does to files, and who reads them

May import everything; the tests import it, as the short form of each torture is a test.
"""
