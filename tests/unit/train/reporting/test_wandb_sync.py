"""An offline run that was gone on with leaves a directory for each launch; `wandb sync` makes one run of them again.

The client's own files and command, against a server on the loopback that keeps the lines of one run as wandb's does: at
the offsets that the client names.
"""

import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LAUNCHES = """
import sys
from pathlib import Path
from train.config.train import LoggingConfig
from train.reporting.wandb_run import Wandb

identity = None
for steps in ((1, 2, 3), (4, 5)):
    told = Wandb(Path(sys.argv[1]), LoggingConfig(wandb="offline"), {"epochs": 3}, identity)
    for step in steps:
        told.log({"loss": 1 / step}, step)
    told.close(within=60)
    identity = told.id
print(identity)
"""


class Server(ThreadingHTTPServer):
    """What `wandb sync` asks of wandb's server."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, list[dict[str, Any]]] = {}
        """The lines of each run's history, by its id."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """To a question in GraphQL."""
        name = given.get("name", "")
        lines = self.runs.get(name)
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "somebody"}}
        if "upsertBucket" in query:
            self.runs.setdefault(name, [])
            bucket = {"id": "b", "name": name, "project": project, "historyLineCount": len(self.runs[name])}
            return {"upsertBucket": {"bucket": bucket, "inserted": lines is None}}
        if "historyLineCount" in query:
            tails = {"historyTail": json.dumps([json.dumps(line) for line in (lines or [])[-1:]]), "eventsTail": "[]"}
            counts = {"historyLineCount": len(lines or []), "eventsLineCount": 0, "logLineCount": 0}
            bucket = {"id": "b", "name": name, "summaryMetrics": "{}", "config": "{}", **tails, **counts}
            return {"model": project | {"bucket": None if lines is None else bucket}}
        if "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def store(self, run: str, files: dict[str, Any]) -> None:
        """The lines of a run from an offset on."""
        if history := files.get("wandb-history.jsonl"):
            self.runs[run][history["offset"] :] = map(json.loads, history["content"])


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.store(self.path.split("/")[-2], json.loads(body).get("files") or {})
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST


def test_a_resumed_offline_run_is_synced_as_one(project_root: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    launches = [sys.executable, "-c", LAUNCHES, str(tmp_path)]
    done = subprocess.run(launches, cwd=project_root, env=env, capture_output=True, text=True, timeout=300, check=True)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}
        sync = [sys.executable, "-m", "wandb", "sync", "--yes", str(tmp_path / "wandb")]  # as train/README.md has it
        subprocess.run(sync, env=env, capture_output=True, text=True, timeout=300, check=True)
        server.shutdown()
    (lines,) = (server.runs[run] for run in server.runs if run == done.stdout.strip())
    assert len(server.runs) == 1
    assert [(line["_step"], line["loss"]) for line in lines] == [(step, 1 / step) for step in range(1, 6)]
