"""What `torture.py files` does to files, and who reads them.

    damages.py   ways to damage a file, by its kind
    readers.py   the files that the three programs read, and what is done with each
    children.py  a process of its own for each try, with bounds on time and memory

May import everything that the tortures may.
"""
