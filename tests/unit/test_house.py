"""Who may import whom, room by room, read from the source: an arrow that is not drawn here fails.

A room is a folder with one subject; the flat files of a top package are its hall.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGES = ("configs", "data", "train", "inference")
OURS = {*PACKAGES, "scripts", "tests"}

MAY_IMPORT = {
    "configs.program": (),
    "configs.program.page": (),
    "data.disk": ("configs.program",),
    "data.schema": (),
    "data.vocabulary": ("data.disk", "configs.program"),
    "data.merges": ("data.vocabulary",),
    "data.export": ("data.merges", "data.vocabulary"),
    "data.config": ("data.schema", "data.vocabulary", "configs.program"),
    "data.template": ("data.export", "data.merges", "data.schema", "data.vocabulary", "configs.program"),
    "data.rows": ("data.schema", "data.template", "data.config", "data.disk", "configs.program"),
    "data.prepared": ("data.schema", "data.template", "data.config", "data.disk", "configs.program"),
    "data.stages": (
        "data.rows",
        "data.prepared.layout",
        "data.prepared.places",
        "data.schema",
        "data.template",
        "data.vocabulary",
        "data.config",
        "data.disk",
        "configs.program",
    ),
    "data.card": ("data.prepared.layout", "data.disk"),
    "data": ("data", "configs.program"),
    "train.config": ("configs.program",),
    "train.failures": ("train.failures.guardian.channel", "train.config", "configs.program"),
    "train.failures.guardian": (),
    "train.lora": ("train.config", "data.disk", "configs.program"),
    "train.model": ("train.lora", "train.config", "data.schema", "data.disk", "configs.program"),
    "train.engine": (
        "train.model",
        "train.lora",
        "train.failures.guard",
        "train.config",
        "data.prepared.dataset",
        "data.disk",
        "configs.program",
    ),
    "train.history": (),
    "train.run_files": ("data.disk",),
    "train.health": ("train.history", "train.config"),
    "train.report": ("train.run_files", "train.config", "data", "configs.program"),
    "train.reporting": (
        "train.history",
        "train.model.routing",
        "train.report",
        "train.run_files",
        "train.config",
        "data.disk",
        "configs.program",
    ),
    "train.saving": (
        "train.engine",
        "train.lora",
        "train.reporting",
        "train.history",
        "train.health",
        "train.run_files",
        "train.config",
        "data.prepared",
        "data.disk",
        "data.template",
        "data.card",
        "configs.program",
    ),
    "train.planning": (
        "train.planning.given",
        "train.model",
        "train.lora",
        "train.config",
        "data.disk",
        "configs.program",
    ),
    "train.planning.given": (
        "train.engine",
        "train.model",
        "train.lora",
        "train.config",
        "data.prepared",
        "data.schema",
        "data.disk",
        "configs.program",
    ),
    "train": ("train", "data", "configs.program"),
    "inference": ("data", "configs.program"),
    "inference.chat": (
        "inference.load",
        "inference.generate",
        "inference.prompt",
        "inference.config",
        "data",
        "configs.program",
    ),
    "inference.batch": (
        "inference.load",
        "inference.generate",
        "inference.prompt",
        "inference.config",
        "data",
        "configs.program",
    ),
    "inference.evaluation": (
        "inference.evaluation.leaderboard",
        "inference.load",
        "inference.generate",
        "inference.config",
        "data",
        "configs.program",
    ),
    "inference.evaluation.leaderboard": ("data.rows", "data.stages.leaderboard", "data.disk", "configs.program"),
    "inference.merging": (
        "inference.load",
        "inference.adapter",
        "inference.peft_layers",
        "inference.unfused",
        "inference.config",
        "inference.card",
        "data",
        "configs.program",
    ),
    "inference.card": (
        "inference.load",
        "inference.adapter",
        "inference.config",
        "inference.evaluation.leaderboard.tasks",
        "data",
        "configs.program",
    ),
}
"""What the files of a room, or of a hall, may import beside their own room. The longest name that fits counts."""

STANDARD_LIBRARY_ALONE = "train.failures.guardian"
DEEPSPEED_ALONE_IN = "train.engine"
LONGEST_FILE = 360
MOST_FILES = 10


def imports(path: Path, package: str) -> set[str]:
    """The dotted modules that a file imports anywhere in it, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def modules(root: Path) -> dict[str, Path]:
    """Every product file by its dotted name, packages by theirs."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(root: Path) -> Iterator[tuple[str, str]]:
    """(importer, imported), both modules of ours."""
    known = modules(root)
    for name, path in known.items():
        for imported in imports(path, name if path.name == "__init__.py" else name.rpartition(".")[0]):
            if imported.split(".")[0] in OURS:
                # `from package.module import thing` may name a thing in the module, or the module itself
                yield name, imported if imported in known else imported.rpartition(".")[0]


def room(name: str) -> str:
    """The entry of `MAY_IMPORT` that a module falls under."""
    while name not in MAY_IMPORT:
        name = name.rpartition(".")[0]
        assert name
    return name


def within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def test_arrows(project_root: Path) -> None:
    for importer, imported in arrows(project_root):
        own = room(importer)
        if imported in ("", own) or (within(imported, own) and room(imported) == own):
            continue
        allowed = MAY_IMPORT[own]
        assert any(within(imported, place) for place in allowed), f"{importer} imports {imported}"


def test_no_circle(project_root: Path) -> None:
    """Of files, nor of rooms."""
    of_files: dict[str, set[str]] = {}
    of_rooms: dict[str, set[str]] = {}
    for importer, imported in arrows(project_root):
        of_files.setdefault(importer, set()).add(imported)
        if room(importer) != room(imported):
            of_rooms.setdefault(room(importer), set()).add(room(imported))
    for graph in (of_files, of_rooms):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as circle:
            pytest.fail(" → ".join(circle.args[1]))


def test_inference_never_imports_train(project_root: Path) -> None:
    assert not [pair for pair in arrows(project_root) if within(pair[0], "inference") and within(pair[1], "train")]


def test_deepspeed_has_one_room(project_root: Path) -> None:
    users = {
        name
        for name, path in modules(project_root).items()
        if any("deepspeed" in module.lower().split(".") for module in imports(path, name))
    }
    assert users
    assert all(within(name, DEEPSPEED_ALONE_IN) for name in users), users


def test_the_guardian_needs_the_standard_library_alone(project_root: Path) -> None:
    files = {name: path for name, path in modules(project_root).items() if within(name, STANDARD_LIBRARY_ALONE)}
    assert files
    for name, path in files.items():
        for module in imports(path, STANDARD_LIBRARY_ALONE):
            assert within(module, STANDARD_LIBRARY_ALONE) or module.split(".")[0] in sys.stdlib_module_names, name


def test_door_plates(project_root: Path) -> None:
    """`__init__.py` files hold a docstring and nothing else."""
    for name, path in modules(project_root).items():
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree), name
            assert len(tree.body) == 1, name


def test_files_and_rooms_stay_small(project_root: Path) -> None:
    of_room: dict[Path, int] = {}
    for name, path in modules(project_root).items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE, name
        if path.name != "__init__.py":
            of_room[path.parent] = of_room.get(path.parent, 0) + 1
    for folder, files in of_room.items():
        assert files <= MOST_FILES, folder


def test_every_kind_of_import_is_read(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom .g import h\n"
        "def i():\n    from j.k import l\n    importlib.import_module('m.n')\n"
    )
    assert imports(path, "p") == {"a.b", "d.e", "p.f", "p.g.h", "j.k.l", "m.n"}
