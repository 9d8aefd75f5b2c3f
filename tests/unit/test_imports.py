"""Who imports whom, read from the source: an arrow that is not drawn in the design fails here."""

import ast
from pathlib import Path

import pytest

OURS = {"data", "train", "inference", "configs", "scripts", "tests"}

MAY_IMPORT = {
    "configs": {"configs"},
    "data": {"data", "configs"},
    "train": {"train", "data", "configs"},
    "inference": {"inference", "data", "configs"},
}


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


def of_package(root: Path, package: str) -> dict[str, set[str]]:
    paths = sorted((root / package).rglob("*.py"))
    assert paths
    return {str(path.relative_to(root)): imports(path, package) for path in paths}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows(project_root: Path, package: str) -> None:
    for file, modules in of_package(project_root, package).items():
        reached = {module.split(".")[0] for module in modules} & OURS
        assert reached <= MAY_IMPORT[package], file


def test_only_the_engine_imports_deepspeed(project_root: Path) -> None:
    files = {
        file
        for package in MAY_IMPORT
        for file, modules in of_package(project_root, package).items()
        if any("deepspeed" in module.lower().split(".") for module in modules)
    }
    assert files == {"train/engine.py"}


def test_schema_imports_nothing_of_ours(project_root: Path) -> None:
    assert not {module.split(".")[0] for module in imports(project_root / "data" / "schema.py", "data")} & OURS


def test_every_kind_of_import_is_read(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom .g import h\n"
        "def i():\n    from j.k import l\n    importlib.import_module('m.n')\n"
    )
    assert imports(path, "p") == {"a.b", "d.e", "p.f", "p.g.h", "j.k.l", "m.n"}
