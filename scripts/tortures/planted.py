"""Plants code in everything that the programs read: pickles, Python, YAML tags, `_target_` keys. Nothing may execute.

Each plant would make a canary file if it ran. That it can run is tried first, by reading it as careless programs do. If
plants stand beside the real files, the programs must do their work as without them; if they replace real files, the
programs must refuse them with exit code 2. What the programs say is recorded.
"""

import argparse
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

from train.saving import checkpoint

from .damage import seal
from .harness.garden import MODULE, Garden
from .harness.outcome import record
from .harness.trials import attempts, common_arguments, report, require
from .harness.workplace import Workplace, opened

CARELESS = {
    "pickle": "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))",
    "torch": "import torch, sys; torch.load(sys.argv[1], weights_only=False)",
    "tag": "import yaml, sys; yaml.unsafe_load(open(sys.argv[1]))",
    # This is what Hydra's `instantiate` does; Hydra 1.3.8 itself refuses functions that execute what they are given.
    "target": "import importlib, json, sys; asked = json.load(open(sys.argv[1]));"
    "module, _, name = asked.pop('_target_').rpartition('.'); getattr(importlib.import_module(module), name)(**asked)",
    "module": "import runpy, sys; runpy.run_path(sys.argv[1])",
}
"""Programs that execute a plant of each kind, given as a file."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py planted`."""
    common_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Plants, runs the programs, prints, and returns what they said."""
    with opened(options) as workplace:
        trials = attempts(options, everything(workplace).items())
        figures = report("Planted code", trials, options.seed)
        workplace.keep = bool(figures["failed"])
    return figures


def everything(workplace: Workplace) -> dict[str, Callable[[], dict[str, Any]]]:
    """All trials by their names."""
    trials: dict[str, Callable[[], dict[str, Any]]] = {
        f"a careless program: {kind}": partial(careless, workplace, kind, program) for kind, program in CARELESS.items()
    }
    for trial in TRIALS:
        name = trial.__name__.replace("_", " ")
        trials[name] = partial(trial, Garden(workplace, workplace.scratch / "gardens" / trial.__name__))
    return trials


def resuming_beside_everything(garden: Garden) -> dict[str, Any]:
    run, base, rows = garden.run(), garden.base(), garden.rows()
    for saved in checkpoint.paths(run):
        garden.beside(saved)
        garden.beside(saved / "adapter")
    for directory in (run / checkpoint.FOLDER, base, rows, rows / "train", rows / "eval"):
        garden.beside(directory)
    (run / "config.yaml").write_text(garden.tag())
    garden.edit(base / "config.json", auto_map={"AutoConfig": "configuration_mixtral.Planted"}, **garden.target())
    garden.train(run, expect=2, base=base, rows=rows)  # the base's config.json has changed
    said = garden.train(run, "resume_despite=[model.path]", expect=0, base=base, rows=rows)
    whole = garden.workplace.reference(1, max_steps="10")
    require(record(run) == record(whole), f"{run} went on otherwise than {whole}")
    return said


def a_run_with_latest_in_it(garden: Garden) -> dict[str, Any]:
    run = garden.run()
    garden.pickle(run / "latest")  # whose name DeepSpeed reads
    return garden.train(run, expect=0)


def a_checkpoint_whose_tensors_are_a_pickle(garden: Garden) -> dict[str, Any]:
    run = garden.run()
    newest = checkpoint.paths(run)[0]
    for state in checkpoint.STATE:
        garden.pickle(newest / f"{state}.safetensors", torch_format=state == "exp_avg")
        seal(newest, f"{state}.safetensors")
    return garden.train(run, expect=0)


def a_checkpoint_whose_settings_are_targets(garden: Garden) -> dict[str, Any]:
    run = garden.run()
    for saved in checkpoint.paths(run):
        trainer = json.loads((saved / checkpoint.TRAINER).read_text())
        trainer["settings"] |= garden.target()
        trainer["settings"]["model"] |= garden.target()
        trainer |= garden.target()
        (saved / checkpoint.TRAINER).write_text(json.dumps(trainer))
        (saved / "adapter" / "train_config.yaml").write_text(garden.tag())
        seal(saved, checkpoint.TRAINER, "adapter/train_config.yaml")
    return garden.train(run, expect=0)


def a_finished_run_whose_receipt_is_a_pickle(garden: Garden) -> dict[str, Any]:
    run = garden.copy(garden.workplace.reference(1, max_steps="10"), "run")
    garden.pickle(run / "receipt.json")
    return garden.train(run, expect=2)


def training_on_a_base_that_is_a_pickle(garden: Garden) -> dict[str, Any]:
    base = garden.base()
    (base / "model.safetensors").unlink()
    garden.pickle(base / "pytorch_model.bin", torch_format=True)
    return garden.train(garden.top / "run", expect=2, base=base)


def training_on_a_base_whose_weights_are_a_pickle(garden: Garden) -> dict[str, Any]:
    base = garden.base()
    garden.pickle(base / "model.safetensors")
    return garden.train(garden.top / "run", expect=2, base=base)


def training_on_a_base_with_code(garden: Garden) -> dict[str, Any]:
    base = garden.base()
    garden.beside(base)
    classes = {"AutoConfig": "configuration_mixtral.Planted", "AutoModelForCausalLM": "modeling_mixtral.Planted"}
    garden.edit(base / "config.json", model_type="planted", auto_map=classes)
    return garden.train(garden.top / "run", expect=2, base=base)


def starting_from_an_adapter_that_is_a_pickle(garden: Garden) -> dict[str, Any]:
    adapter = garden.adapter()
    (adapter / "adapter_model.safetensors").unlink()
    garden.pickle(adapter / "adapter_model.bin", torch_format=True)
    return garden.train(garden.top / "run", f"lora.start={adapter}", expect=2)


def starting_from_an_adapter_beside_plants(garden: Garden) -> dict[str, Any]:
    adapter = garden.adapter()
    garden.beside(adapter)
    (adapter / "train_config.yaml").write_text(garden.tag())
    return garden.train(garden.top / "run", f"lora.start={adapter}", "max_steps=1", expect=0)


def training_on_rows_that_are_a_pickle(garden: Garden) -> dict[str, Any]:
    rows = garden.rows()
    for arrow in [*rows.rglob("*.arrow")]:
        garden.pickle(arrow)
    return garden.train(garden.top / "run", expect=2, rows=rows)


def training_on_a_manifest_with_a_target(garden: Garden) -> dict[str, Any]:
    rows = garden.rows()
    garden.edit(rows / "manifest.json", planted=garden.tag(), **garden.target())
    return garden.train(garden.top / "run", "max_steps=1", expect=0, rows=rows)


def a_recipe_with_a_tag(garden: Garden) -> dict[str, Any]:
    (garden.top / "own" / "recipe").mkdir(parents=True)
    (garden.top / "own" / "recipe" / "planted.yaml").write_text("# @package _global_\n" + garden.tag())
    own = (f"--config-dir={garden.top}/own",)
    return garden.train(garden.top / "run", "recipe=planted", expect=2, options=own)


def a_recipe_with_a_target(garden: Garden) -> dict[str, Any]:
    (garden.top / "own" / "recipe").mkdir(parents=True)
    target = "".join(f"  {key}: {value}\n" for key, value in garden.target().items())
    text = f"# @package _global_\nmodel:\n{target}"
    (garden.top / "own" / "recipe" / "planted.yaml").write_text(text)
    own = (f"--config-dir={garden.top}/own",)
    return garden.train(garden.top / "run", "recipe=planted", expect=2, options=own)


def a_target_on_the_command_line(garden: Garden) -> dict[str, Any]:
    target = [f"+model.{key}='{value}'" for key, value in garden.target().items()]
    return garden.train(garden.top / "run", *target, expect=2)


def answering_beside_everything(garden: Garden) -> dict[str, Any]:
    base, adapter = garden.base(), garden.adapter()
    garden.beside(base)
    garden.beside(adapter)
    (adapter / "train_config.yaml").write_text(garden.tag())
    garden.edit(base / "config.json", auto_map={"AutoConfig": "configuration_mixtral.Planted"}, **garden.target())
    garden.edit(adapter / "receipt.json", planted=garden.tag(), **garden.target())
    return garden.ask(f"base={base}", f"adapter={adapter}", expect=0)


def answering_with_stock_peft_beside_everything(garden: Garden) -> dict[str, Any]:
    adapter = garden.adapter()
    garden.beside(adapter)
    mapping = {"base_model_class": "Planted", "parent_library": MODULE}
    garden.edit(adapter / "adapter_config.json", auto_mapping=mapping, megatron_core=MODULE)
    return garden.ask(f"adapter={adapter}", "fold=false", expect=0)


def merging_beside_everything(garden: Garden) -> dict[str, Any]:
    base, adapter = garden.base(), garden.adapter()
    garden.beside(base)
    garden.beside(adapter)
    return garden.type(
        "inference", "task=merge", f"base={base}", f"adapter={adapter}", f"output={garden.top}/merged", expect=0
    )


def answering_with_an_adapter_that_is_a_pickle(garden: Garden) -> dict[str, Any]:
    adapter = garden.adapter()
    (adapter / "adapter_model.safetensors").unlink()
    garden.pickle(adapter / "adapter_model.bin", torch_format=True)
    return garden.ask(f"adapter={adapter}", expect=2)


def answering_with_an_adapter_whose_tensors_are_a_pickle(garden: Garden) -> dict[str, Any]:
    adapter = garden.adapter()
    garden.pickle(adapter / "adapter_model.safetensors", torch_format=True)
    return garden.ask(f"adapter={adapter}", expect=2)


def answering_with_a_target_in_the_adapter(garden: Garden) -> dict[str, Any]:
    adapter = garden.adapter()
    garden.edit(adapter / "adapter_config.json", **garden.target())
    return garden.ask(f"adapter={adapter}", expect=2)


def answering_with_modules_named_by_the_adapter(garden: Garden) -> dict[str, Any]:
    adapter = garden.adapter()
    garden.edit(adapter / "adapter_config.json", megatron_core=MODULE, megatron_config={"planted": True})
    return garden.ask(f"adapter={adapter}", expect=2)


def answering_with_a_base_that_is_a_pickle(garden: Garden) -> dict[str, Any]:
    base = garden.base()
    (base / "model.safetensors").unlink()
    garden.pickle(base / "pytorch_model.bin", torch_format=True)
    return garden.ask(f"base={base}", expect=2)


def answering_with_a_tokenizer_with_code(garden: Garden) -> dict[str, Any]:
    base = garden.base()
    garden.module(base / "tokenization_planted.py")
    classes = {"AutoTokenizer": ["tokenization_planted.Planted", "tokenization_planted.Planted"]}
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Planted", "auto_map": classes}))
    garden.pickle(base / "tokenizer.model")
    return garden.ask(f"base={base}", expect=2)


def preparing_rows_that_are_pickles(garden: Garden) -> dict[str, Any]:
    said = {}
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.pt", "rows.yaml"):
        garden.pickle(garden.top / name, torch_format=name.endswith(".pt"))
        said = garden.type("data", f"files=[{garden.top / name}]", f"output={garden.top}/prepared", expect=2)
    return said


def preparing_rows_about_tags_and_targets(garden: Garden) -> dict[str, Any]:
    garden.top.mkdir(parents=True, exist_ok=True)
    rows = [
        {"instruction": garden.tag(), "output": "${oc.env:HOME}", **garden.target()},
        {"instruction": "{{ cycler.__init__.__globals__.os.system('" + garden.command + "') }}", "output": "a"},
        {"instruction": zlib.compress(garden.command.encode()).hex(), "output": f"$({garden.command})"},
    ]
    file = garden.top / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return garden.type(
        "data", f"files=[{file}]", f"output={garden.top}/prepared", "seq_len=512", "eval_fraction=0", expect=0
    )


def looking_at_rows_beside_plants(garden: Garden) -> dict[str, Any]:
    rows = garden.rows()
    for directory in (rows, rows / "train", rows / "eval"):
        garden.beside(directory)
    return garden.type("data", "task=report", f"output={rows}", expect=0)


Trial = Callable[[Garden], dict[str, Any]]
TRIALS: tuple[Trial, ...] = (
    resuming_beside_everything,
    a_run_with_latest_in_it,
    a_checkpoint_whose_tensors_are_a_pickle,
    a_checkpoint_whose_settings_are_targets,
    a_finished_run_whose_receipt_is_a_pickle,
    training_on_a_base_that_is_a_pickle,
    training_on_a_base_whose_weights_are_a_pickle,
    training_on_a_base_with_code,
    starting_from_an_adapter_that_is_a_pickle,
    starting_from_an_adapter_beside_plants,
    training_on_rows_that_are_a_pickle,
    training_on_a_manifest_with_a_target,
    a_recipe_with_a_tag,
    a_recipe_with_a_target,
    a_target_on_the_command_line,
    answering_beside_everything,
    answering_with_stock_peft_beside_everything,
    merging_beside_everything,
    answering_with_an_adapter_that_is_a_pickle,
    answering_with_an_adapter_whose_tensors_are_a_pickle,
    answering_with_a_target_in_the_adapter,
    answering_with_modules_named_by_the_adapter,
    answering_with_a_base_that_is_a_pickle,
    answering_with_a_tokenizer_with_code,
    preparing_rows_that_are_pickles,
    preparing_rows_about_tags_and_targets,
    looking_at_rows_beside_plants,
)


def careless(workplace: Workplace, kind: str, program: str) -> dict[str, Any]:
    """The plants do work: a program that trusts them makes the canary."""
    garden = Garden(workplace, workplace.scratch / "gardens" / f"careless-{kind}")
    garden.top.mkdir(parents=True)
    plant = garden.top / f"{kind}.py"
    if kind in ("pickle", "torch"):
        garden.pickle(plant, torch_format=kind == "torch")
    elif kind == "module":
        garden.module(plant)
    else:
        plant.write_text(garden.tag() if kind == "tag" else json.dumps(garden.target()))
    subprocess.run([sys.executable, "-c", program, str(plant)], capture_output=True, check=False, timeout=120)
    require(garden.canary.exists(), "the plant does nothing: it would show nothing")
    return {"said": "executed, as it has to be"}
