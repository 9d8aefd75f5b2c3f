#!/usr/bin/env python
"""Measures this project against its peers, in one run, on the same work: python scripts/benchmark.py NAME [--json FILE]

`python scripts/benchmark.py --help` lists the benchmarks. Their peers come with `pip install -e ".[bench]"`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout that this file is in, wherever another is installed

import _command

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "peft",
    "deepspeed",
    "trl",
    "accelerate",
    "lm-eval",
)
"""Packages whose versions the figures depend on, ours and the peers'."""

if __name__ == "__main__":
    sys.exit(_command.main("benchmark", "benchmarks", __doc__.splitlines()[0], PACKAGES))
