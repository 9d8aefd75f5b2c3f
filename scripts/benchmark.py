#!/usr/bin/env python
"""Measures this project against its peers, in one run, on the same work: python scripts/benchmark.py NAME [--json FILE]

`python scripts/benchmark.py --help` lists the benchmarks. Their peers come with `pip install -e ".[bench]"`.
"""

import argparse
import datetime
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that this file is in, wherever another one is installed

from configs.errors import UserError  # noqa: E402
from configs.receipt import machine, provenance  # noqa: E402

BENCHMARKS = sorted(path.stem for path in (Path(__file__).parent / "benchmarks").glob("[a-z]*.py"))
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "peft", "deepspeed", "trl", "accelerate")
"""Those whose versions the figures depend on, ours and the peers'."""


def main() -> int:
    """Runs one benchmark; 2 where the user's input is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in BENCHMARKS}
    for name, module in modules.items():
        choice = choices.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        choice.add_argument("--json", type=Path, metavar="FILE", help="write the figures and their receipt there too")
        module.arguments(choice)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        figures = modules[options.benchmark].run(options)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    if options.json:
        receipt = {"started": started, **provenance(PACKAGES), "hardware": machine()}
        record = {"benchmark": options.benchmark, "receipt": receipt, "figures": figures}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"Wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
