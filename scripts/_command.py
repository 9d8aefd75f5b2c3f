"""The command line that scripts/benchmark.py and scripts/torture.py share: NAME [--json FILE], and what FILE holds.

Each name is a module in a folder beside this file: `arguments(parser)`, and `run(options)`, which prints its tables and
returns its figures, fit for JSON.
"""

import argparse
import datetime
import importlib
import json
import sys
from pathlib import Path

from configs.program.console import quiet_libraries
from configs.program.errors import UserError
from configs.program.provenance import machine, provenance


def main(kind: str, folder: str, description: str, packages: tuple[str, ...]) -> int:
    """Runs one module of the folder: 2 if the user's input is wrong, 1 if its figures name something `failed`.

    Args:
        kind: what the modules are, as messages and FILE say it.
        folder: where they lie.
        description: what `--help` says of the program.
        packages: those whose versions the figures depend on.
    """
    quiet_libraries()
    parser = argparse.ArgumentParser(description=description)
    choices = parser.add_subparsers(dest="chosen", required=True, metavar="NAME")
    names = sorted(path.stem for path in (Path(__file__).parent / folder).glob("*.py") if path.stem != "__init__")
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
        options.json.write_text(in_lines(record) + "\n", encoding="utf-8")
        print(f"Wrote {options.json}")
    return 1 if figures.get("failed") else 0


def in_lines(value: object, indent: str = "") -> str:
    """JSON for people and diffs: a line for each entry of a dictionary and for each element of a list of points."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(key)}: {in_lines(entry, inner)}" for key, entry in value.items()]
        return "{\n" + inner + f",\n{inner}".join(lines) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(element, dict | list | tuple) for element in value):
        return "[\n" + inner + f",\n{inner}".join(map(json.dumps, value)) + f"\n{indent}]"
    return json.dumps(value)
