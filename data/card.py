"""What a model card says of base, data, recipe and prompt format, as others recorded it; and the card of an adapter."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from data.disk.adapter_directory import PER_EXPERT, RECEIPT, TRAIN_CONFIG, public
from data.disk.formats import sizes
from data.disk.plain_text import json_if_readable, member, parse_yaml, plain, read_bytes, read_start
from data.prepared.layout import MANIFEST

CARD = "README.md"

HEAD = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
"""The YAML at the beginning of a model card."""

NO_LICENCE = (None, "", "~", "null", "none")
"""What a card may say that names no licence."""

MOST_SOURCES = 50
"""Files and datasets of the data that the card names one by one."""

SEAL = "\n<!-- openhermes-mixtral {} -->\n"
"""The last line of a card, with the SHA-256 of what stands before it; no page shows it."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

ADAPTER_SNIPPET = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "path/to/this/directory"
tokenizer = AutoTokenizer.from_pretrained(adapter)
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, adapter)
messages = [{{"role": "user", "content": "Hello, who are you?"}}]
prompt = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True).to(model.device)
answer = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""

APART = """
This form names each expert's matrices, for transformers 4 and vLLM; the one in the directory above it is for
transformers 5.
"""

TOGETHER = """
This form is for transformers 5; `per_expert/` names each expert's matrices, for transformers 4 and vLLM.
"""

PROMPT_FORMAT = """\
The LLaMA-2 chat format. `<s>` and `</s>` are control tokens; the answer ends with `</s>`.

    <s>[INST] <<SYS>>
    {system}
    <</SYS>>

    {user} [/INST] {assistant} </s><s>[INST] {user} [/INST]

`tokenizer.apply_chat_template` gives exactly the token ids that training used, whatever the messages say; only in
llama.cpp, a control token that a message spells is read with four odd tokens in it. The rendered text already begins
with `<s>`, and the tokenizer adds none: put it before text that is given without the template, which lm-eval and
`/v1/completions` don't do by themselves.
"""


@dataclass(frozen=True, slots=True)
class Story:
    """What others recorded about base and adapter, in the card's words."""

    licence: str | None
    data: str
    recipe: str
    left_out: tuple[str, ...]
    """A sentence for each file that can't be used."""


def read_story(base: Path | None, adapter: Path, settings: dict[str, Any], training: dict[str, Any]) -> Story:
    """Reads all that the card takes over: only texts, so anything strange is left out and makes no merge fail.

    Args:
        base: the base's directory, whose own card may name a licence; None if it is not at hand.
        adapter: the adapter's directory.
        settings: its adapter_config.json.
        training: its receipt; empty if there is none.
    """
    left_out: list[str] = []
    return Story(
        licence=None if base is None else _licence_of(base / CARD, left_out),
        data=_data(training, left_out),
        recipe=_recipe(adapter / TRAIN_CONFIG, settings, left_out),
        left_out=tuple(left_out),
    )


def write_adapter_card(directory: Path, name: str, settings: dict[str, Any], training: dict[str, Any]) -> None:
    """Writes README.md into an adapter's directory, in which its other files are.

    Args:
        directory: of the adapter.
        name: what it is called.
        settings: its adapter_config.json.
        training: its receipt.
    """
    path = member(training, "base").get("path")
    local = Path(path) if path and Path(path).is_dir() else None
    story = read_story(local, directory, settings, training)
    card = AdapterCard(directory=directory, name=name, settings=settings, training=training, story=story, base=path)
    (directory / CARD).write_bytes(card.text().encode("utf-8", "replace"))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """The card of an adapter."""

    directory: Path
    name: str
    settings: dict[str, Any]
    """Its adapter_config.json."""
    training: dict[str, Any]
    """Its receipt; empty if training left none."""
    story: Story
    base: str | None
    """The base's directory or hub id."""
    licence: str | None = None
    """Overrides the base's."""
    evaluation: str | None = None
    """The section on its scores."""
    results: list[EvalResult] = field(default_factory=list)
    """The same for the hub."""

    def text(self) -> str:
        """All of it."""
        recorded = member(self.training, "base")
        called = str(public(self.base)) if self.base else None
        licence = self.licence or self.story.licence
        head = ModelCardData(
            license=licence,
            base_model=called if called and HUB_ID.fullmatch(called) and not Path(str(self.base)).is_dir() else None,
            library_name="peft",
            pipeline_tag="text-generation",
            tags=["mixtral", "lora"],
            model_name=self.name if self.results else None,  # which stands with results alone
            eval_results=self.results or None,
        )
        snippet = ADAPTER_SNIPPET.format(base=called or "path/to/the/base")
        base = called or ("Random weights" if "path" in recorded else "Not recorded")
        sections = {
            "Use": f"```python\n{snippet}```\n" + _which(self.directory),
            **({"Prompt format": PROMPT_FORMAT} if self.training else {}),
            "Base": describe_base(base, recorded.get("revision"), recorded.get("fingerprint")),
            "Data": self.story.data,
            "Recipe": self.story.recipe,
            **({"Evaluation": self.evaluation} if self.evaluation else {}),
            "Licence": licence_section(licence),
        }
        by = ", trained with OpenHermes-Mixtral" if self.training else ""
        return composed(head, self.name, f"Low-rank adapters for a Mixtral{by}.\n", sections)


def _which(directory: Path) -> str:
    """Which of the two forms of an adapter is in a directory, if there are two."""
    return APART if directory.name == PER_EXPERT else TOGETHER if (directory / PER_EXPERT).is_dir() else ""


def composed(head: ModelCardData, name: str, introduction: str, sections: dict[str, str]) -> str:
    """A card: the head as YAML, sections of text by their titles, and the seal by which `is_untouched` knows it."""
    body = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    card = f"---\n{head.to_yaml()}\n---\n\n# {name}\n\n{introduction}\n{body}"
    return card + SEAL.format(_digest(card.encode("utf-8", "replace")))


def is_untouched(path: Path) -> bool:
    """Whether a file is a card that this project wrote and nobody has edited."""
    content = read_bytes(path, sizes.RECORD) or b""
    written = content[: -len(SEAL.format(_digest(b"")))]
    return content == written + SEAL.format(_digest(written)).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def describe_base(name: str, revision: str | None, fingerprint: str | None) -> str:
    """The section on the base."""
    at = f", revision {revision}" if revision else ""
    mark = f" Fingerprint of its weights: `{fingerprint}`." if fingerprint else ""
    return f"{name}{at}.{mark}\n"


def licence_section(licence: str | None) -> str:
    """The section on the licence."""
    says = f"{licence}. " if licence else "The base names no licence, so its terms have to be looked up. "
    return f"{says}The terms of the data apply beside it.\n"


def _licence_of(card: Path, left_out: list[str]) -> str | None:
    """The licence in the head of a model card; None if it names none."""
    start = read_start(card, sizes.HEAD)
    if start is None:
        return None
    found = HEAD.match(start.decode("utf-8-sig", "replace"))
    if found is None:
        return None
    head = parse_yaml(found[1])
    licence = plain((head or {}).get("license"))
    if head is None or (licence is None and head.get("license")):
        left_out.append(f"the base's {CARD}: its head can't be read as plain YAML, so its licence is left out")
    return None if licence in NO_LICENCE else licence


def _data(training: dict[str, Any], left_out: list[str]) -> str:
    """What the prepared dataset's manifest says, if it is still the one that was trained on."""
    dataset = member(training, "dataset")
    digest, path = plain(dataset.get("manifest_sha256")), dataset.get("path")
    if digest is None:
        if training.get("dataset"):
            left_out.append(f"the adapter's {RECEIPT}: its dataset can't be read, so it is left out")
        return "Not recorded.\n"
    lines = [f"Prepared dataset with manifest `{digest}` (SHA-256)."]
    manifest = json_if_readable(Path(path) / MANIFEST, sizes.MANIFEST, sha256=digest) if isinstance(path, str) else {}
    if not manifest and isinstance(path, str) and os.path.lexists(Path(path) / MANIFEST):
        left_out.append(f"the dataset's {MANIFEST}: it is not the one that was trained on, so it is left out")
    inputs = manifest.get("inputs", [])
    sources = [source for source in inputs if isinstance(source, dict)] if isinstance(inputs, list) else []
    for source in sources[:MOST_SOURCES]:
        name = plain(source.get("dataset")) or Path(plain(source.get("file")) or "unnamed").name
        revision = plain(source.get("revision"))
        at = f", revision {revision}" if revision else ""
        lines.append(f"- {name}{at}: {_count(source.get('rows'))} rows")
    if len(sources) > MOST_SOURCES:
        lines.append(f"- and {len(sources) - MOST_SOURCES} more")
    counts = member(manifest, "rows")
    if counts:
        lines.append(f"\nOf {_count(counts.get('in'))} rows, {_count(counts.get('kept'))} could be used.")
    if manifest and not (sources and counts):
        left_out.append(f"the dataset's {MANIFEST}: not all of it can be read, and what can't is left out")
    return "\n".join(lines) + "\n"


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "an unknown number of"


def _recipe(config: Path, settings: dict[str, Any], left_out: list[str]) -> str:
    targets = [*_listed(settings.get("target_modules")), *_listed(settings.get("target_parameters"))]
    lines = [
        f"- LoRA rank {settings.get('r')}, alpha {settings.get('lora_alpha')}"
        + (", rank-stabilised" if settings.get("use_rslora") else ""),
        f"- adapted: {', '.join(targets)}",
    ]
    content = read_bytes(config, sizes.HEAD)
    train = None if content is None else parse_yaml(content.decode("utf-8", "replace"))
    if train is not None:
        optim = member(train, "optim")
        epochs, batch, seed = (_known(train.get(name)) for name in ("epochs", "global_batch", "seed"))
        rate, warmup, final, clip = (_known(optim.get(n)) for n in ("lr", "warmup_fraction", "final_fraction", "clip"))
        lines += [
            f"- {epochs} epochs, {batch} packed rows a step, seed {seed}",
            f"- AdamW, peak learning rate {rate}, warm-up over {warmup} of the steps, cosine to {final} of the peak, "
            f"clipped at {clip}",
        ]
    elif config.exists():
        left_out.append(f"the adapter's {config.name}: it can't be read as plain YAML, so it is left out")
    return "\n".join(lines) + "\n"


def _known(value: object) -> str:
    return plain(value) or "unknown"


def _listed(targets: Any) -> list[str]:
    return sorted(targets) if isinstance(targets, list) else [targets] if targets else []
