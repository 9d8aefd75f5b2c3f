"""llama.cpp: the merged model through its converter into a GGUF file, its tokenizer, logits and answers.

The converter is part of the sources of llama-cpp-python, which are unpacked into `sources` of the environment.
"""

import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import comparing
import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
from transformers import AutoTokenizer

TOKENS = 48


def compare(job: comparing.Job) -> None:
    gguf = job.scratch / "model.gguf"
    converter = next(sources().glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    subprocess.run([sys.executable, converter, job.model, "--outfile", str(gguf), "--outtype", "f32"], check=True)
    # Keys and values in float32 as all else: in float16, the default, a router with a near tie takes another expert.
    exact = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    model = Llama(str(gguf), n_ctx=1024, logits_all=True, verbose=False, use_mmap=False, **exact)
    template = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    texts = [template.apply_chat_template(case["messages"], tokenize=False) for case in job.cases]
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    pairs = list(zip(ids, job.cases, strict=True))
    job.same("ids of chat prompts", [(found, case["ids"]) for found, case in pairs if not case["spelled"]])
    spelled = [(found, case["ids"]) for found, case in pairs if case["spelled"]]
    job.same("ids of prompts that spell control tokens", spelled, needed=False)
    job.near("logits", last_logits(model, job), job.logits["merged"])
    job.attempt("answers by create_chat_completion", lambda: answers(job, model))


def sources() -> Path:
    """The sources of the llama-cpp-python that is installed."""
    directory = Path(sys.prefix) / "sources"
    if not directory.is_dir():
        version = f"llama-cpp-python=={metadata.version('llama-cpp-python')}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=llama-cpp-python"]
        archives = Path(sys.prefix) / "archives"
        subprocess.run([*command, "--dest", str(archives), version], check=True)
        with tarfile.open(next(archives.glob("*.tar.gz"))) as archive:
            archive.extractall(directory, filter="data")
    return directory


def last_logits(model: Llama, job: comparing.Job) -> np.ndarray:
    found = []
    for case in job.cases[: len(job.logits["merged"])]:
        model.reset()
        model.eval(case["ids"])
        found.append(np.array(model.scores[model.n_tokens - 1]))
    return np.stack(found)


def answers(job: comparing.Job, model: Llama) -> None:
    pairs = []
    for case in job.answered:
        reply = model.create_chat_completion(case["messages"], max_tokens=TOKENS, temperature=0, repeat_penalty=1)
        pairs.append((reply["choices"][0]["message"]["content"].strip(), case["answer"].strip()))
    job.same("answers by create_chat_completion", pairs, needed=False)


if __name__ == "__main__":
    comparing.run(compare)
