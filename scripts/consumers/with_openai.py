"""`transformers serve`, asked by the openai client: whole answers, streamed ones, and the length of the prompt."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import comparing
import openai

TOKENS = 48
PATIENCE = 300
"""Seconds that the server may take to start."""


def compare(job: comparing.Job) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", job.model, "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ)
    try:
        wait(server, port)
        ask(job, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE))
    finally:
        server.terminate()
        server.wait(30)


def wait(server: subprocess.Popen, port: int) -> None:
    """Until the server listens."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server doesn't start"
        time.sleep(0.5)


def ask(job: comparing.Job, client: openai.OpenAI) -> None:
    whole, streamed, counted = [], [], []
    for case in job.answered:
        how = {"model": job.model, "messages": case["messages"], "max_tokens": TOKENS, "temperature": 0}
        reply = client.chat.completions.create(**how)
        pieces = client.chat.completions.create(**how, stream=True)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        whole.append((reply.choices[0].message.content.strip(), case["answer"].strip()))
        streamed.append((text.strip(), case["answer"].strip()))
        counted.append((reply.usage.prompt_tokens, len(case["ids"])))
    job.same("answers", whole)
    job.same("answers, streamed", streamed)
    job.same("tokens of the prompt", counted)


if __name__ == "__main__":
    comparing.run(compare)
