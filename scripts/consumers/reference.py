"""What this project makes of the prompts: the ids, logits, log-likelihoods and answers that others are compared with.

Everything is computed in float32 on the CPU, from our own tokenizer, loader and generation.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data.schema import Conversation, Message
from data.template import ChatTokenizer
from inference.config import InferenceConfig
from inference.generate import generate
from inference.load import Loaded, load

ROOT = Path(__file__).parents[2]
SAMPLES = ("general.jsonl", "identity.jsonl")
SPELLED = (
    "What does </s> mean?",
    "Is <s>[INST] the same as [INST]?",
    "<unk><s></s>",
    "Say [/INST] </s><s>[INST] twice.",
)
"""Prompts that spell control tokens, which must not become them."""
LOGITS, ANSWERS, TOKENS = 32, 20, 48
"""Prompts whose logits are compared, prompts that are answered, and how long answers are at most."""


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, and what we make of it."""

    messages: list[dict[str, str]]
    ids: list[int]
    reply: str | None
    """What the sample replies."""
    spelled: bool
    answer: str | None = None
    loglikelihood: float | None = None
    """The log-likelihood of the sample's reply, without the space and `</s>` after it, in nats."""


def make(base: str, adapter: Path, merged: Path, directory: Path) -> None:
    """Writes cases.json and logits.npz: of the merged model, and of base and adapter."""
    model = load(_config(base=str(merged)))
    cases = [_answered(model, case, index) for index, case in enumerate(_cases(model.tokenizer))]
    apart = load(_config(base=base, adapter=str(adapter)))
    asked = [case.ids for case in cases[:LOGITS]]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cases.json").write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    np.savez(directory / "logits.npz", merged=_last_logits(model, asked), adapter=_last_logits(apart, asked))


def _config(**settings: str) -> InferenceConfig:
    return InferenceConfig(dtype="float32", device="cpu", max_new_tokens=TOKENS, markers="keep", **settings)  # type: ignore[arg-type]


def _cases(tokenizer: ChatTokenizer) -> list[Case]:
    """The sample's prompts, in an order that mixes its files, and those that spell control tokens."""
    rows = [json.loads(line) for name in SAMPLES for line in (ROOT / "data/sample" / name).read_text().splitlines()]
    rows = [row for start in range(29) for row in rows[start::29]]
    texts = [("\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]) for row in rows]
    cases = []
    for text, reply in (*texts, *((text, None) for text in SPELLED)):
        ids = tokenizer.encode_prompt(Conversation((Message("user", text),)))
        cases.append(Case([{"role": "user", "content": text}], ids, reply, spelled=reply is None))
    return cases


def _answered(model: Loaded, case: Case, index: int) -> Case:
    """The first cases get an answer and a log-likelihood too."""
    if index >= ANSWERS or case.reply is None:
        return case
    asked = Conversation((Message("user", case.messages[0]["content"]),))
    ids = model.tokenizer.encode(Conversation((*asked.messages, Message("assistant", case.reply)))).ids[:-2]
    with torch.inference_mode():
        scores = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].double(), -1)
    reply = range(len(case.ids), len(ids))
    likelihood = sum(float(scores[at - 1, ids[at]]) for at in reply)
    answer = generate(model, _config(base="merged"), asked, lambda _: None).text
    return Case(case.messages, case.ids, case.reply, case.spelled, answer, likelihood)


def _last_logits(model: Loaded, prompts: list[list[int]]) -> np.ndarray:
    """[prompts, vocabulary], float32: what follows each prompt."""
    with torch.inference_mode():
        return np.stack([model.model(torch.tensor([ids])).logits[0, -1].float().numpy() for ids in prompts])
