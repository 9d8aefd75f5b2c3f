"""The model card of a merged checkpoint: what was recorded of base and adapter, and a snippet that runs."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from data.card import CARD, HUB_ID, PROMPT_FORMAT, Story, composed, describe_base, licence_section
from data.disk.nf4 import UNQUANTISED
from inference.card.scores import Measured, describe_scores, on_the_hub

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


def write_card(
    directory: Path, name: str, story: Story, scores: Measured | None, receipt: dict[str, Any], licence: str | None
) -> None:
    """Writes README.md into `directory`; it says that what nobody recorded is unknown.

    Args:
        directory: the checkpoint.
        name: what the model is called.
        story: what others recorded.
        scores: what an evaluation measured; None if there is none.
        receipt: of the merge.
        licence: overrides the base's.
    """
    source = receipt["base"]["path"]
    from_hub = HUB_ID.fullmatch(source) is not None and not Path(source).is_dir()
    licence, results = licence or story.licence, on_the_hub(scores.scores if scores else [])
    head = ModelCardData(
        license=licence,
        base_model=source if from_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixtral", "lora-merged"],
        model_name=name if results else None,  # which stands with results alone
        eval_results=results or None,
    )
    sections = {
        "Use": f"```python\n{SNIPPET.format(name=name)}```\n",
        "Prompt format": PROMPT_FORMAT,
        "Base": describe_base(
            source if from_hub else "/".join(Path(source).parts[-2:]),
            receipt["base"]["revision"],
            receipt["base"]["fingerprint"],
        )
        + _form(receipt["adapter"]),
        "Data": story.data,
        "Recipe": story.recipe,
        **({"Evaluation": describe_scores(scores)} if scores else {}),
        "Verification": _verification(receipt["verification"]),
        "Licence": licence_section(licence),
    }
    introduction = "A Mixtral fine-tuned with low-rank adapters by OpenHermes-Mixtral, merged into one checkpoint.\n"
    card = composed(head, name, introduction, sections)
    (directory / CARD).write_bytes(card.encode("utf-8", "replace"))  # a directory's name may be no UTF-8


def _form(adapter: dict[str, Any]) -> str:
    if (form := adapter.get("trained_on_base_in", UNQUANTISED)) == UNQUANTISED:
        return ""
    return f"\nThe adapter was trained on this base quantised to {form}, and is merged into its 16 bits here.\n"


def _verification(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "Not verified after merging.\n"
    m = measured
    far = m.get("logits_difference_from_training")
    quantised = "" if far is None else f" From the quantised base and adapter, as trained, they differ by {far:.1e}."
    return (
        f"{m['tensors_changed']:,} tensors carry the adapter, and {m['tensors_bit_identical']:,} are the base's bit by "
        f"bit. On {m['positions']:,} positions of real conversations the logits are within "
        f"{m['logits_difference']:.1e} of those of base and adapter in a wider dtype, while base and adapter unmerged "
        f"are within {m['logits_difference_unmerged']:.1e} and the base alone within "
        f"{m['logits_difference_without_adapter']:.1e}.{quantised} Everything is in `merge.json`.\n"
    )
