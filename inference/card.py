"""The model card of a merged checkpoint: base, data, recipe, prompt format, licence, and a snippet that runs."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.layout import MANIFEST
from inference.adapter import read_json

CARD = "README.md"

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = "{name}"
tokenizer = AutoTokenizer.from_pretrained(model)
model = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto")
messages = [{{"role": "user", "content": "Hello, who are you?"}}]
prompt = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True).to(model.device)
answer = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""

PROMPT_FORMAT = """\
The LLaMA-2 chat format. `<s>` and `</s>` are control tokens; the answer ends with `</s>`.

    <s>[INST] <<SYS>>
    {system}
    <</SYS>>

    {user} [/INST] {assistant} </s><s>[INST] {user} [/INST]

`tokenizer.apply_chat_template` gives exactly the token ids that training used, whatever the messages say. The rendered
text already begins with `<s>`, and the tokenizer adds none.
"""


def write_card(directory: Path, name: str, base: Path, receipt: dict[str, Any], licence: str | None) -> None:
    """Writes README.md into `directory`; what nobody recorded is said to be unknown.

    Args:
        directory: the checkpoint.
        name: what the model is called.
        base: the base's directory, whose own card may name a licence.
        receipt: of the merge, with that of the adapter in it.
        licence: overrides the base's.
    """
    source = receipt["base"]["path"]
    from_hub = HUB_ID.fullmatch(source) is not None and not Path(source).is_dir()
    licence = licence or _licence_of(base)
    head = ModelCardData(
        license=licence,
        base_model=source if from_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixtral", "lora-merged"],
    )
    sections = {
        "Use": f"```python\n{SNIPPET.format(name=name)}```\n",
        "Prompt format": PROMPT_FORMAT,
        "Base": _base(receipt, source if from_hub else "/".join(Path(source).parts[-2:])),
        "Data": _data(receipt["adapter"]["receipt"]),
        "Recipe": _recipe(Path(receipt["adapter"]["path"]), receipt["adapter"]["settings"]),
        "Verification": _verification(receipt["verification"]),
        "Licence": (f"{licence}. " if licence else "The base names no licence, so its terms have to be looked up. ")
        + "The terms of the data apply beside it.\n",
    }
    body = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    introduction = "A Mixtral fine-tuned with low-rank adapters by OpenHermes-Mixtral, merged into one checkpoint.\n"
    (directory / CARD).write_text(f"---\n{head.to_yaml()}\n---\n\n# {name}\n\n{introduction}\n{body}", encoding="utf-8")


def _licence_of(base: Path) -> str | None:
    """The licence in the head of the base's own card."""
    if not (base / CARD).is_file():
        return None
    try:
        licence = ModelCard.load(base / CARD).data.license
    except ValueError:  # a head that is no YAML
        return None
    return str(licence) if licence else None


def _base(receipt: dict[str, Any], name: str) -> str:
    revision = receipt["base"]["revision"]
    at = f", revision {revision}" if revision else ""
    return f"{name}{at}. Fingerprint of its weights: `{receipt['base']['fingerprint']}`.\n"


def _data(training: dict[str, Any]) -> str:
    """What the prepared dataset's manifest says, where it is still the one that was trained on."""
    dataset = training.get("dataset") or {}
    if not dataset:
        return "Not recorded.\n"
    lines = [f"Prepared dataset with manifest `{dataset.get('manifest_sha256')}` (SHA-256)."]
    manifest = read_json(Path(str(dataset.get("path"))) / MANIFEST, sha256=dataset.get("manifest_sha256"))
    for source in manifest.get("inputs", []):
        name = source.get("dataset") or Path(source.get("file", "")).name
        revision = f", revision {source['revision']}" if source.get("revision") else ""
        lines.append(f"- {name}{revision}: {source.get('rows', 0):,} rows")
    counts = manifest.get("rows") or {}
    if counts:
        lines.append(f"\nOf {counts.get('in', 0):,} rows, {counts.get('kept', 0):,} could be used.")
    return "\n".join(lines) + "\n"


def _recipe(adapter: Path, settings: dict[str, Any]) -> str:
    targets = [*_listed(settings.get("target_modules")), *_listed(settings.get("target_parameters"))]
    lines = [
        f"- LoRA rank {settings.get('r')}, alpha {settings.get('lora_alpha')}"
        + (", rank-stabilised" if settings.get("use_rslora") else ""),
        f"- adapted: {', '.join(targets)}",
    ]
    try:
        train = OmegaConf.to_container(OmegaConf.load(adapter / "train_config.yaml"))
    except (OSError, OmegaConfBaseException, ValueError):
        train = None
    if isinstance(train, dict):
        optim = train.get("optim") or {}
        lines += [
            f"- {train.get('epochs')} epochs, {train.get('global_batch')} packed rows a step, seed {train.get('seed')}",
            f"- AdamW, peak learning rate {optim.get('lr')}, warm-up over {optim.get('warmup_fraction')} of the steps, "
            f"cosine to {optim.get('final_fraction')} of the peak, clipped at {optim.get('clip')}",
        ]
    return "\n".join(lines) + "\n"


def _listed(targets: Any) -> list[str]:
    return sorted(targets) if isinstance(targets, list) else [targets] if targets else []


def _verification(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "Not verified after merging.\n"
    m = measured
    return (
        f"{m['tensors_changed']:,} tensors carry the adapter, and {m['tensors_bit_identical']:,} are the base's bit by "
        f"bit. On {m['positions']:,} positions of real conversations the logits are within "
        f"{m['logits_difference']:.1e} of those of base and adapter in a wider dtype, where base and adapter unmerged "
        f"are within {m['logits_difference_unmerged']:.1e} and the base alone within "
        f"{m['logits_difference_without_adapter']:.1e}. Everything is in `merge.json`.\n"
    )
