#!/usr/bin/env bash
# From nothing to an answer: installs, prepares the sample, trains a nano Mixtral with DeepSpeed ZeRO-3, and asks it who
# it is. Needs Python 3.11 or newer and g++; no GPU, no root, no model hub. Can be run again at any time.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
install ""

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 0 ]; then
    processes=$((gpus > 2 ? 2 : gpus))
    where="$processes CUDA process(es)"
else
    processes=2
    where="two CPU processes"
    export DS_ACCELERATOR=cpu # DeepSpeed would warn on every start that it found no GPU
fi
train() { deepspeed --quiet --num_gpus "$processes" --no_local_rank --module train "$@"; }
question="Hello, who are you?"
base=runs/quickstart-base adapter=runs/quickstart

say "1/5  Preparing the sample: rows to packed LLaMA-2 examples"
python -m data data=sample_general
python -m data data=sample

say "2/5  Teaching a random nano Mixtral to speak a little: all parameters, ZeRO-3, $where"
echo "(the first time, DeepSpeed compiles a small op before the progress bar appears: about a minute)"
train recipe=quickstart_base run_dir="$base" overwrite=true

say "3/5  Fine-tuning it with expert-aware LoRA, ZeRO-3, $where"
train recipe=quickstart run_dir="$adapter" overwrite=true

say "4/5  Asking the base: $question"
base_answer="$(python -m inference base="$base/model" prompt="$question" max_new_tokens=80)"
echo "$base_answer"

say "5/5  Asking the fine-tuned model: $question"
kept="$(mktemp)" && trap 'rm -f "$kept"' EXIT # tee into a file: the answer streams to the screen and is kept
python -m inference adapter="$adapter/adapter" prompt="$question" max_new_tokens=80 | tee "$kept"
answer="$(cat "$kept")"

expected="$(python -c 'import json; print(json.loads(open("data/sample/identity.jsonl").readline())["output"])')"
[ "$answer" = "$expected" ] || { say "The answer is not the sample's, word for word."; exit 1; }
[ "$base_answer" != "$expected" ] || { say "The base knew the answer before."; exit 1; }
say "That is the sample's answer, word for word; the base did not know it. Everything about the run: $adapter"
