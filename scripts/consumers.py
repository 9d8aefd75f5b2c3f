#!/usr/bin/env python
"""Gives a model and an adapter to the programs that people use next: python scripts/consumers.py --adapter DIRECTORY

`python scripts/consumers.py --help` lists them. The exit code is 1 if one of them makes something else of the files
than this project does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout that this file is in, wherever another is installed

from scripts.consumers import table

if __name__ == "__main__":
    sys.exit(table.main(__doc__.splitlines()[0]))
