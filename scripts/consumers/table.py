"""The consumers, each in an environment of its own, and the table of what they make of a model and an adapter.

The environments take some gigabytes and, for llama.cpp, a compiler; they are kept, so that a second run is fast. It is
run by hand and not in the tests: the package index is asked for the newest releases.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.program.errors import UserError
from configs.program.provenance import machine, provenance
from inference.config import InferenceConfig
from inference.load import find_base
from scripts._command import in_lines
from scripts.consumers import environment, reference

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Consumer:
    """A program of others: what is installed for it, what compares it, and the packages whose versions count."""

    requirements: tuple[str, ...]
    program: str
    packages: tuple[str, ...]


CONSUMERS = {
    "transformers-4": Consumer(
        ("transformers==4.57.*", "peft==0.18.*"), "with_stock.py", ("transformers", "peft", "tokenizers")
    ),
    "transformers": Consumer(("transformers", "peft"), "with_stock.py", ("transformers", "peft", "tokenizers")),
    "serve": Consumer(("transformers[serving]", "openai"), "with_openai.py", ("transformers", "openai")),
    "lm-eval": Consumer(("lm-eval[hf]",), "with_lm_eval.py", ("lm_eval", "transformers")),
    "mergekit": Consumer(("mergekit",), "with_mergekit.py", ("mergekit", "transformers")),
    "llama.cpp": Consumer(
        ("llama-cpp-python", "transformers", "sentencepiece", "gguf", "protobuf"),
        "with_llama_cpp.py",
        ("llama-cpp-python", "gguf", "transformers"),
    ),
}
"""In the order of the table."""


def main(description: str) -> int:
    """The program: 2 if the user's input is wrong, 1 if a point that has to hold doesn't."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--adapter", type=Path, default=Path("runs/quickstart/adapter"), help="an adapter directory")
    parser.add_argument("--base", help="its base, if it is not where the adapter says")
    parser.add_argument("--only", action="append", choices=CONSUMERS, help="one of them; may be given more than once")
    parser.add_argument(
        "--environments", type=Path, default=ROOT / ".consumers", help="where the environments are kept"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the points and their receipt there too")
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        points = compare(options)
    except UserError as error:
        print(f"consumers: {error}", file=sys.stderr)
        return 2
    show(points)
    failed = [f"{point['consumer']}: {point['what']}" for point in points if not point["holds"]]
    if options.json:
        receipt = {"started": started, **provenance(("torch", "transformers", "peft")), "hardware": machine()}
        record = {"receipt": receipt, "figures": {"failed": failed, "points": points}}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(in_lines(record) + "\n", encoding="utf-8")
        print(f"Wrote {options.json}")
    return 1 if failed else 0


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every point of every consumer: `consumer`, `versions`, `what`, and how it came out."""
    base = str(find_base(InferenceConfig(adapter=str(options.adapter), base=options.base)).directory.resolve())
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        merge = [sys.executable, "-m", "inference", "task=merge", f"adapter={options.adapter}", f"base={base}"]
        surroundings = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
        if code := subprocess.run([*merge, f"output={top}/merged"], check=False, **surroundings).returncode:
            raise UserError(f"adapter={options.adapter}: merging it ended with {code}; see above")
        reference.make(base, options.adapter, top / "merged", top / "reference")
        per_expert = options.adapter / "per_expert"
        job = {
            "model": str(top / "merged"),
            "base": base,
            "adapter": str(options.adapter.resolve()),
            "per_expert": str(per_expert.resolve()) if per_expert.is_dir() else None,
            "reference": str(top / "reference"),
        }
        for name in options.only or CONSUMERS:
            points += ask(name, job, top / name, options.environments.resolve())
    return points


def ask(name: str, job: dict[str, Any], scratch: Path, environments: Path) -> list[dict[str, Any]]:
    """The points of one consumer; a single one that doesn't hold if its program ends with an error."""
    consumer = CONSUMERS[name]
    print(f"{name}: {' '.join(consumer.requirements)}", flush=True)
    python = environment.make(environments / name, consumer.requirements)
    scratch.mkdir()
    (scratch / "job.json").write_text(json.dumps(job | {"scratch": str(scratch)}))
    # Nothing of ours, and no GPU: sums on one differ, and the question here is whether the files are understood.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env = kept | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, ROOT / "scripts" / "consumers" / consumer.program, scratch / "job.json", scratch / "result.json"]
    done = subprocess.run(command, cwd=scratch, env=env, check=False)
    found = {"consumer": name, "versions": versions(python, consumer.packages)}
    if done.returncode:
        return [found | {"what": "all", "error": f"it ended with {done.returncode}", "holds": False}]
    return [found | point for point in json.loads((scratch / "result.json").read_text())]


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """What an environment has of these packages."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {packages}}}))"
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], text=True))
    return found


def outcome(point: dict[str, Any]) -> str:
    """One point in a few words; (!) after one that has to hold and doesn't."""
    if "error" in point:
        found = str(point["error"])
    elif "difference" in point:
        found = f"{point['difference']:.1e} of the largest apart"
    else:
        found = f"{point['equal']:,} of {point['cases']:,} equal"
    return found if point["holds"] else f"{found} (!)"


def show(points: list[dict[str, Any]]) -> None:
    """The table, in Markdown, so that it can stand in a README; what belongs to a consumer stands below its name."""
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print("| consumer | what is compared | |\n|---|---|---|")
    before = None
    for point in points:
        released = ", ".join(f"{package} {version}" for package, version in point["versions"].items())
        named = "" if point["consumer"] == before else f"{point['consumer']}: {released} "
        console.print(f"| {named}| {point['what']} | {outcome(point)} |")
        before = point["consumer"]
