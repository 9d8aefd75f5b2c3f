"""The model, the adapter and the answers in other people's programs.

    environment.py     an environment for each program, from the package index, with this interpreter's torch
    reference.py       what this project makes of the prompts: ids, logits, log-likelihoods, answers
    comparing.py       how the programs below compare theirs with it
    with_stock.py      transformers and PEFT, of several versions
    with_lm_eval.py    lm-eval's model for transformers
    with_mergekit.py   mergekit reads the model and writes another
    with_llama_cpp.py  llama.cpp's converter, tokenizer and runtime
    with_openai.py     the openai client asks `transformers serve`

The last six run in the environments of others, and import nothing of ours.
"""
