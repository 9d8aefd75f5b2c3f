#!/usr/bin/env python
"""Makes training runs end badly, and checks whether they go on exactly: python scripts/torture.py NAME [--json FILE]

`python scripts/torture.py --help` lists what can be done to them. The exit code is 1 if something did not go as it
has to; the output then says what repeats it, and the directories stay.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout that this file is in, wherever another is installed

import _command

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "safetensors", "datasets", "hydra-core")
"""Packages whose versions the outcome depends on."""

if __name__ == "__main__":
    sys.exit(_command.main("torture", "tortures", __doc__.splitlines()[0], PACKAGES))
