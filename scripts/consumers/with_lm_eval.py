"""lm-eval's model for transformers: log-likelihoods of replies to chat prompts, and `<s>` before plain text."""

import comparing
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

PLAIN = "The capital of Hungary is Budapest."
BOS = 1


def compare(job: comparing.Job) -> None:
    model = HFLM(pretrained=job.model, dtype="float32", device="cpu", batch_size=1)
    prompts = [model.apply_chat_template(case["messages"]) for case in job.cases]
    pairs = zip(prompts, job.cases, strict=True)
    plain = [(model.tok_encode(prompt), case["ids"]) for prompt, case in pairs if not case["spelled"]]
    job.same("ids of chat prompts (apply_chat_template=True)", plain)

    asked = [
        Instance("loglikelihood", {}, (model.apply_chat_template(case["messages"]), f" {case['reply']}"), index)
        for index, case in enumerate(job.answered)
    ]
    theirs = np.array([likelihood for likelihood, _ in model.loglikelihood(asked, disable_tqdm=True)])
    ours = np.array([case["loglikelihood"] for case in job.answered])
    job.near("log-likelihoods of replies", theirs, ours)

    job.same("first id of plain text is `<s>`", [(model.tok_encode(PLAIN)[0], BOS)], needed=False)
    with_bos = HFLM(pretrained=job.model, dtype="float32", device="cpu", add_bos_token=True)
    job.same("the same with add_bos_token=True", [(with_bos.tok_encode(PLAIN)[0], BOS)])


if __name__ == "__main__":
    comparing.run(compare)
