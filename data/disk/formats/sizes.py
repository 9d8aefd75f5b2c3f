"""How large a file may be that is read as a whole, by its kind, in bytes: well above what any of them has that was
meant, and far below what memory holds. Rows and weights are read in parts, and have no such bound."""

HEAD = 64 << 10
"""The head of a card, or a train_config.yaml: a page of text."""

SETTINGS = 4 << 20
"""config.json, adapter_config.json, a run's config.yaml, a checkpoint's manifest.json, expert_load.json, results.json:
some kilobytes; an adapter_config.json that names each module of a Mixtral has 100 kB."""

README = 8 << 20
"""The README.md of a dataset, whose head may list hundreds of configs."""

RECORD = 16 << 20
"""receipt.json and trainer.json, which name each file of a base and each evaluation: some kilobytes."""

INDEX = 16 << 20
"""model.safetensors.index.json, a line for each tensor: Mixtral-8x7B's has 100 kB."""

SENTENCEPIECE = 16 << 20
"""tokenizer.model: Mixtral's has 0.5 MB."""

HEADER = 32 << 20
"""The header of a safetensors file, an entry for each tensor: Mixtral-8x7B's have some ten thousand bytes."""

TOKENIZER = 64 << 20
"""tokenizer.json: Mixtral's has 4 MB, those of the largest vocabularies 35."""

MANIFEST = 64 << 20
"""manifest.json of a prepared dataset, and what lists the files of a saved one: an entry for each file of rows."""

LINES = 256 << 20
"""metrics.jsonl and launches.jsonl, a line for each step or launch: 300 bytes a step."""

EVALUATION = 512 << 20
"""Questions that rows are compared with, unpacked: MMLU has 8 MB."""

ANSWERS = 1 << 30
"""questions.jsonl of an evaluation, a line for each question with what was answered."""
