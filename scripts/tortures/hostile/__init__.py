"""What `torture.py files` does to files, and who reads them.

    damages.py       ways to damage a file, by its kind
    json_damages.py  those of JSON, of a line of it, and of the head of a safetensors file
    programs.py      what the three programs do with files
    sound.py         the files, as they are before anything is done to them
    readers.py       who reads which file, and what must come of it
    children.py      a process of its own for each try, with bounds on time and memory

May import everything that the tortures may.
"""
