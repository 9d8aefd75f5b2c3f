"""Stock transformers and PEFT: ids, logits and answers of the merged model, logits of base and adapter."""

import comparing
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

TOKENS = 48


def compare(job: comparing.Job) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, trust_remote_code=False)
    prompts = [tokenizer.apply_chat_template(case["messages"], return_dict=False) for case in job.cases]
    job.same("ids of chat prompts", zip(prompts, (case["ids"] for case in job.cases), strict=True))
    job.near("logits of the merged model", last_logits(model, job), job.logits["merged"])
    job.attempt("answers by generate", lambda: generate(job, tokenizer, model))
    job.attempt("answers by pipeline, four at a time", lambda: generate_in_batches(job, tokenizer, model))
    for name, adapter in (("adapter", job.adapter), ("adapter/per_expert", job.per_expert)):
        if adapter is not None:
            what = f"logits of base and {name} in PEFT"
            job.attempt(what, lambda what=what, adapter=adapter: with_adapter(job, what, adapter))


def generate(job: comparing.Job, tokenizer, model) -> None:
    pairs = []
    for case in job.answered:
        inputs = tokenizer.apply_chat_template(case["messages"], return_dict=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        said = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        pairs.append((said.strip(), case["answer"].strip()))
    job.same("answers by generate", pairs)


def generate_in_batches(job: comparing.Job, tokenizer, model) -> None:
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=4)
    given = [case["messages"] for case in job.answered]
    outputs = answer(given, max_new_tokens=TOKENS, do_sample=False)
    said = [output[0]["generated_text"][-1]["content"].strip() for output in outputs]
    ours = [case["answer"].strip() for case in job.answered]
    job.same("answers by pipeline, four at a time", zip(said, ours, strict=True))


def with_adapter(job: comparing.Job, what: str, adapter: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32, trust_remote_code=False)
    theirs = last_logits(PeftModel.from_pretrained(base, adapter).eval(), job)
    # transformers 4 has no fused experts for the adapter's own files to change; per_expert is for it.
    fused = any("gate_up_proj" in name for name, _ in base.named_parameters())
    job.near(what, theirs, job.logits["adapter"], needed=fused or adapter != job.adapter)


def last_logits(model, job: comparing.Job) -> np.ndarray:
    cases = job.cases[: len(job.logits["merged"])]
    with torch.inference_mode():
        return np.stack([model(input_ids=torch.tensor([case["ids"]])).logits[0, -1].numpy() for case in cases])


if __name__ == "__main__":
    comparing.run(compare)
