"""The settings of every program: YAML in groups, as diffs over dataclasses that stand beside the code which uses them.

    program/   what makes a module a program

No code stands here itself. `README.md` says what the groups are and how to add to them.
"""
