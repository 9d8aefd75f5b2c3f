"""scripts/install.sh with real pip and venv: from an index behind a proxy, and from one whose file is not what it says.

A server here is both proxy and index. What is installed is a small package, and a checkout that needs it.
"""

import contextlib
import hashlib
import http.server
import os
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INDEX = "http://packages.invalid/simple"
"""No machine has this name: who gets there went by the proxy."""
WHEEL = "tiny-1.0-py3-none-any.whl"
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "checkout"
version = "1.0"
"""
BACKEND = """
import zipfile

METADATA = "Metadata-Version: 2.1\\nName: checkout\\nVersion: 1.0\\nRequires-Dist: tiny\\n"

def build_editable(directory, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{directory}/checkout-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("checkout-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("checkout-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("checkout-1.0.dist-info/RECORD", "")
    return "checkout-1.0-py3-none-any.whl"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts, that needs the small package."""
    top = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", top / "scripts")
    (top / "pyproject.toml").write_text(PROJECT)
    (top / "backend.py").write_text(BACKEND)
    (top / "constraints.txt").write_text("tiny==1.0\n")
    return top


@contextlib.contextmanager
def proxy(directory: Path, *, damaged: bool) -> Iterator[tuple[int, list[str]]]:
    """The port of one that knows the index, and what was asked of it."""
    wheel = directory / WHEEL
    with zipfile.ZipFile(wheel, "w") as file:
        name = "tiny-1.0.dist-info"
        file.writestr("tiny.py", "")
        file.writestr(f"{name}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        file.writestr(f"{name}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes() + b"?" * damaged).hexdigest()
    pages = {
        f"{INDEX}/tiny/": ("text/html", f'<a href="{WHEEL}#sha256={digest}">{WHEEL}</a>'.encode()),
        f"{INDEX}/tiny/{WHEEL}": ("application/zip", wheel.read_bytes()),
    }
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)  # a proxy is asked for the whole address
            kind, content = pages.get(self.path, ("text/plain", b""))
            self.send_response(200 if content else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


def install(checkout: Path, port: int) -> subprocess.CompletedProcess[str]:
    """As quickstart.sh does, with pip's own variables and nothing else that pip was told on this machine."""
    environment = {
        name: value for name, value in os.environ.items() if not name.lower().startswith(("pip_", "virtual"))
    }
    environment = {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}
    environment |= {"PIP_INDEX_URL": INDEX, "PIP_TRUSTED_HOST": "packages.invalid", "PIP_CONFIG_FILE": "/dev/null"}
    environment |= {"PIP_PROXY": f"http://127.0.0.1:{port}", "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0"}
    script = 'set -euo pipefail; source scripts/install.sh; install ""'
    return subprocess.run(
        ["bash", "-c", script, "quickstart.sh"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_installs_from_an_index_behind_a_proxy_by_pips_own_settings(checkout: Path, tmp_path: Path) -> None:
    with proxy(tmp_path, damaged=False) as (port, asked):
        done = install(checkout, port)
        assert done.returncode == 0, done.stderr + (checkout / ".venv/pip.log").read_text()
        assert f"{INDEX}/tiny/{WHEEL}" in asked
        asked.clear()
        assert install(checkout, port).returncode == 0
        assert not asked  # what is there already is not asked for
    subprocess.run([checkout / ".venv/bin/python", "-c", "import tiny"], check=True)


def test_a_file_that_is_not_what_the_index_says_is_not_installed(checkout: Path, tmp_path: Path) -> None:
    with proxy(tmp_path, damaged=True) as (port, _):
        done = install(checkout, port)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "quickstart.sh: pip could not install the packages (ERROR: THESE PACKAGES DO NOT MATCH"
    )
    assert not list(checkout.glob(".venv/lib/*/site-packages/tiny*"))
    assert not (checkout / ".venv/installed").exists()
