"""mergekit: the merged model passed through unchanged, and averaged with its base."""

import subprocess
import sys
from pathlib import Path

import comparing
import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM


def compare(job: comparing.Job) -> None:
    through = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": job.model}]}
    averaged = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [{"model": model, "parameters": {"weight": 0.5}} for model in (job.model, job.base)],
    }
    ours, base = tensors(Path(job.model)), tensors(Path(job.base))
    job.attempt("tensors passed through", lambda: pass_through(job, through, ours))
    job.attempt("weights averaged with the base's", lambda: average(job, averaged, ours, base))


def pass_through(job: comparing.Job, recipe: dict, ours: dict) -> None:
    theirs = merged(job, "through", recipe)
    job.same("tensors passed through", [(torch.equal(theirs[name], ours[name]), True) for name in ours])


def average(job: comparing.Job, recipe: dict, ours: dict, base: dict) -> None:
    theirs = merged(job, "averaged", recipe)
    names = sorted(ours)
    expected = np.concatenate([((ours[name] + base[name]) / 2).numpy().ravel() for name in names])
    found = np.concatenate([theirs[name].numpy().ravel() for name in names])
    job.near("weights averaged with the base's", found[None], expected[None], tolerance=1e-6)


def merged(job: comparing.Job, name: str, recipe: dict) -> dict:
    """What mergekit makes of a recipe."""
    written, output = job.scratch / f"{name}.yaml", job.scratch / name
    written.write_text(yaml.safe_dump(recipe))
    command = Path(sys.executable).with_name("mergekit-yaml")
    subprocess.run([command, str(written), str(output), "--no-cuda"], check=True)
    return tensors(output)


def tensors(directory: Path) -> dict:
    """The parameters as transformers reads them: mergekit writes the experts of a layer as one."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).state_dict()


if __name__ == "__main__":
    comparing.run(compare)
