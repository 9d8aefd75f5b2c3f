"""A conversation in the terminal, or through a pipe.

    chat.py      the program: lines in, answers on stdout, everything else on stderr
    commands.py  what a line means: a command, or a message
    talk.py      the conversation so far, in a context that never overflows
    terminal.py  lines that are edited and remembered; words wrapped at the window

May import inference.{load,generate,prompt,config}, data and configs.program.
"""
