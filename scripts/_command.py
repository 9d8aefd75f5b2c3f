"""The command line that scripts/benchmark.py and scripts/torture.py share: NAME [--json FILE], and what FILE holds.

Each name is a module of a folder beside this file: `arguments(parser)`, and `run(options)`, which prints its tables and
returns its figures, fit for JSON.
"""

import argparse
import datetime
import importlib
import json
import sys
from pathlib import Path

from configs.program.errors import UserError
from configs.program.provenance import machine, provenance


def main(kind: str, folder: str, description: str, packages: tuple[str, ...]) -> int:
    """Runs one module of the folder: 2 where the user's input is wrong, 1 where its figures name something `failed`.

    Args:
        kind: what the modules are, as in messages and in FILE.
        folder: where they lie.
        description: of the program.
        packages: those whose versions the figures depend on.
    """
    parser = argparse.ArgumentParser(description=description)
    choices = parser.add_subparsers(dest="chosen", required=True, metavar="NAME")
    names = sorted(path.stem for path in (Path(__file__).parent / folder).glob("[a-z]*.py"))
    wanted = [name for name in names if name in sys.argv[1:2]] or names  # the others' libraries take seconds to import
    modules = {name: importlib.import_module(f"{folder}.{name}") for name in wanted}
    for name, module in modules.items():
        choice = choices.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        choice.add_argument("--json", type=Path, metavar="FILE", help="write the figures and their receipt there too")
        module.arguments(choice)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        figures = modules[options.chosen].run(options)
    except UserError as error:
        print(f"{kind}: {error}", file=sys.stderr)
        return 2
    if options.json:
        receipt = {"started": started, **provenance(packages), "hardware": machine()}
        record = {kind: options.chosen, "receipt": receipt, "figures": figures}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"Wrote {options.json}")
    return 1 if figures.get("failed") else 0
