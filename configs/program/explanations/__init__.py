"""What the programs tell a person about the command line: what can be typed, what is wrong with it, how to go on.

    program.py       a program as its command line knows it: name, settings, groups
    environment.py   a package that is missing: the environment is not active
    help.py          `--help`: commands, groups, and every setting with its docstring
    command_line.py  mistakes that show before Hydra composes: options, plus and tilde, commas, unknown names
    names.py         which setting an unknown name stands for, by the names of other projects too
    recipes.py       the YAML files that a command line chooses: package, defaults, encoding
    composing.py     what Hydra, OmegaConf and YAML raise → one sentence
    again.py         the command with which a run goes on

May import configs.program; only entry.py and the programs use it.
"""
