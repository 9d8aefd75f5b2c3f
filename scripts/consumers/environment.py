"""An environment for a program of others: its packages from the package index, torch from this interpreter.

The index' torch would bring gigabytes of CUDA that no comparison here needs. So this interpreter's torch, of whatever
build, is lent: a folder of links to it is put on the environment's path, and pip takes it for installed. pip removes
nothing that lies outside of an environment, and is told to take no other version.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from configs.program.errors import UserError

OF_TORCH = ("nvidia-", "cuda-", "triton")
"""Beginnings of the names of packages that a CUDA build of torch needs, which are lent with it."""
MADE = "made.txt"
"""Says with which requirements an environment was made."""


def make(directory: Path, requirements: tuple[str, ...]) -> Path:
    """Makes an environment, or finds the one that was made with the same requirements; returns its interpreter.

    Raises:
        UserError: pip can't install the requirements.
    """
    python, mark = directory / "bin" / "python", directory / MADE
    wanted = "\n".join((sys.version, f"torch {importlib.metadata.version('torch')}", *requirements))
    if mark.is_file() and mark.read_text() == wanted:
        return python
    _run(directory, [sys.executable, "-m", "venv", "--clear", str(directory)])
    lent = _lend_torch(directory / "lent")
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    (Path(purelib.strip()) / "lent.pth").write_text(f"{lent}\n")
    constraints = directory / "constraints.txt"
    constraints.write_text(f"torch==={importlib.metadata.version('torch')}\n")
    # torch by name, so that pip brings what it needs
    _run(directory, [str(python), "-m", "pip", "install", "-c", str(constraints), "torch", *requirements])
    mark.write_text(wanted)
    return python


def _lend_torch(directory: Path) -> Path:
    """A folder of links to torch and what it is made of."""
    directory.mkdir()
    for name in ("torch", *_packages_of_torch()):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = directory / top  # several packages share the folder nvidia
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return directory


def _packages_of_torch() -> set[str]:
    names = {entry.metadata["Name"] for entry in importlib.metadata.distributions()}
    return {name for name in names if name.startswith(OF_TORCH)}


def _run(directory: Path, command: list[str]) -> None:
    log = directory.with_name(f"{directory.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
            raise UserError(f"{directory.name}: its packages can't be installed; {log} says why")
