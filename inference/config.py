"""The settings of inference, and the checks across them."""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from configs.program.checks import ABOVE_0, between, choice, positive, share
from configs.program.errors import UserError
from data.stages.leaderboard import HUB_TASKS

TASKS = ("generate", "chat", "batch", "evaluate", "merge", "card")

SCORED = tuple(HUB_TASKS)
"""The tasks of the card's table."""

SMALLEST_TEMPERATURE = 1e-6
"""Logits divided by less would overflow; long before that, sampling gives the likeliest token every time."""


@dataclass(kw_only=True, slots=True)
class InferenceConfig:
    """Settings of `python -m inference`."""

    task: str = "generate"
    """`generate` streams one answer to stdout, `chat` holds a conversation in the terminal, `batch` answers the rows of
    a file, `evaluate` scores the tasks of the model card's table, `merge` writes base and adapter as one checkpoint,
    `card` the model card of an adapter."""

    # The model

    adapter: str | None = None
    """The adapter directory of a run (`runs/…/adapter`), or a hub id. Unset, the base answers alone."""
    adapter_revision: str | None = None
    """The commit, tag or branch of an adapter's hub id."""
    base: str | None = None
    """The base model, or a merged one: a directory or a hub id; unset, the one that the adapter was trained on."""
    revision: str | None = None
    """The commit, tag or branch of the base's hub id; unset, the one that the adapter names."""
    check_base: bool = True
    """Refuses a base whose weights are not those that the adapter's receipt names."""
    weights: str = "bf16"
    """How the base is held: `bf16` as `dtype` says; `nf4` has attention and experts in four bits, 0.29 of the bytes,
    and the adapter beside them, whatever `fold` says. It takes the extra `nf4`."""
    fold: bool = True
    """Adds the adapter to the base's weights at load; `false` keeps it apart in stock PEFT's layers: slower."""
    dtype: str = "auto"
    """`bfloat16`, `float16` or `float32`; `auto` is bfloat16, and float16 on GPUs without bfloat16. `merge` keeps the
    dtype of the base's files."""
    device: str = "auto"
    """`auto` takes CUDA if there is a GPU; `cuda`, `cpu`."""
    device_map: str = "auto"
    """How layers are spread over several GPUs, in accelerate's words: `auto` (one GPU if the model fits), `balanced`,
    `sequential`, `cuda:0`."""

    # What is asked

    prompt: str = ""
    """What the user says; `-` reads it from stdin."""
    prompt_file: str | None = None
    """A file to read the prompt from instead."""
    system: str | None = None
    """The system message, if there is to be one."""
    markers: str = "reject"
    """What to do if a message holds the template's own markers, such as `[/INST]`, with which it could fake a turn:
    `reject`, or `keep` as plain text. With `reject` an answer also ends as soon as it begins to write markers."""

    # How it is answered

    max_new_tokens: int = 512
    """Ends an answer after this many tokens."""
    stop: list[str] = field(default_factory=list)
    """Ends an answer before any of these strings."""
    temperature: float = 0.0
    """0 takes the likeliest token each time (greedy); above 0 samples."""
    top_p: float = 1.0
    """Samples among the likeliest tokens that have this probability together."""
    top_k: int = 0
    """Samples among this many of the likeliest tokens; 0 means all."""
    min_p: float = 0.0
    """Samples among the tokens that are at least this share as likely as the likeliest; 0 means all."""
    repetition_penalty: float = 1.0
    """Makes tokens that the prompt or the answer already holds less likely: positive logits are divided by it, negative
    ones multiplied. 1 leaves them alone."""
    seed: int = 0
    """Decides what is sampled; in `chat`, each further answer has the next seed."""
    history: bool = True
    """For `chat`: keeps what is typed for later sessions, in ~/.local/state/openhermes-mixtral (XDG_STATE_HOME)."""

    # For `evaluate`

    tasks: list[str] = field(default_factory=lambda: list(SCORED))
    """Tasks of the card: arc, hellaswag, mmlu, truthfulqa, winogrande, gsm8k; or any of lm-eval's, such as `ifeval`, if
    the extra `eval` is installed."""
    data: str | None = None
    """A directory with the tasks' rows, a folder for each; unset, the hub's datasets at fixed commits."""
    limit: int | None = None
    """Questions of each task, the first in the leaderboard's shuffled order; unset, all."""
    compare: str | None = None
    """`base` scores the base alone too, and compares in pairs; or the output of an earlier evaluation."""
    trained_on: str | None = None
    """A prepared dataset: questions that share thirteen words in a row with its training rows are counted, and the
    scores of the others given beside."""
    bos: str = "leaderboard"
    """Where `<s>` stands before a context: `always`, `never`, or as in what the `leaderboard` published: for GSM8K
    alone."""
    chat: bool = False
    """Asks in the chat template: the context is the user's message, and the choice the beginning of the reply. The
    leaderboard did not."""
    max_tokens: int = 4096
    """Tokens that one forward reads, which bounds its memory; a single longer question is read alone."""

    # Files

    input: str | None = None
    """For `batch`: a file as `python -m data` takes it (JSON Lines, a JSON array, Parquet; .gz, .zst), each row in one
    of its schemas or with a `prompt`, and with an `id` if it has one."""
    output: str | None = None
    """For `batch` the file of answers, for `merge` the directory of the model, for `evaluate` the directory of the
    result; unset, `evaluation` beside the adapter. For `card` the file; unset, README.md in the adapter's directory."""
    overwrite: bool = False
    """Replaces an output that is there already."""
    batch_size: int = 16
    """Prompts that are answered at a time, at most."""
    batching: str = "continuous"
    """`continuous` is transformers' continuous batching, which takes in the next prompt as soon as one has ended;
    `padded` answers prompts of similar length together until all have ended, and after a kill it samples the same."""
    licence: str | None = None
    """For `merge` and `card`: the licence in the model card, an SPDX identifier; unset, the one of the base's card."""
    verify: bool = True
    """For `merge`: compares what was written with base and adapter before the output takes its name."""

    def check(self) -> None:
        """Raises `UserError` for values that can't be used, alone or together."""
        choice("task", self.task, *TASKS)
        if self.task == "generate":
            self._check_prompt()
        if self.task in ("batch", "merge") and not self.output:
            example = "answers.jsonl" if self.task == "batch" else "models/merged"
            raise UserError(f"output: task={self.task} has nowhere to write; give for example output={example}")
        if self.task == "batch" and not self.input:
            raise UserError("input: there are no prompts; give for example input=prompts.jsonl")
        if self.task == "merge" and self.adapter is None:
            raise UserError("adapter: there is nothing to merge; give adapter=runs/…/adapter")
        if self.task == "card" and self.adapter is None:
            raise UserError("adapter: there is nothing to write a card for; give adapter=runs/…/adapter")
        if self.task == "merge" and self.dtype != "auto":
            raise UserError(f"dtype={self.dtype}: a merged model has the dtype of the base's files; leave it out")
        choice("weights", self.weights, "bf16", "nf4")
        if self.task == "merge" and self.weights != "bf16":
            raise UserError(f"weights={self.weights}: a merged model has the 16 bits of the base's files; leave it out")
        for name, text in (("prompt", self.prompt), ("system", self.system or "")):
            check_utf8(name, text)
        if self.adapter is None and self.base is None:
            raise UserError("adapter: no model is named; give adapter=runs/…/adapter, or base= for a model without one")
        if self.task == "evaluate":
            self._check_evaluation()
        self.check_sampling()
        between("batch_size", self.batch_size, 1, math.inf, "it must be at least 1; give for example 16")
        choice("batching", self.batching, "continuous", "padded")
        choice("dtype", self.dtype, "auto", "bfloat16", "float16", "float32")
        choice("device", self.device, "auto", "cpu", "cuda")

    def _check_evaluation(self) -> None:
        if not self.tasks:
            raise UserError(f"tasks: there is nothing to score; give some of {', '.join(SCORED)}")
        for name in self.tasks:
            if name not in SCORED and find_spec("lm_eval") is None:
                raise UserError(
                    f"tasks={name}: it is none of {', '.join(SCORED)}; for the tasks of lm-eval, install the extra: "
                    f'pip install -e ".[eval]"'
                )
            if self.tasks.count(name) > 1:
                raise UserError(f"tasks={name}: it is named twice; name each task once")
        if self.data is not None and not Path(self.data).is_dir():
            raise UserError(f"data={self.data}: there is no such directory; check the path")
        if self.limit is not None:
            between(
                "limit", self.limit, 2, math.inf, "one question has no standard error; give at least 2, or leave it out"
            )
        if self.compare == "base" and self.adapter is None:
            raise UserError("compare=base: that compares the base with an adapter, and none is named; give adapter=")
        choice("bos", self.bos, "leaderboard", "always", "never")
        between("max_tokens", self.max_tokens, 1, math.inf, "it must be at least 1; give for example 4096")

    def _check_prompt(self) -> None:
        if self.prompt_file is not None and self.prompt:
            raise UserError(f"prompt_file={self.prompt_file}: there is a prompt= beside it; give one of the two")
        if self.prompt_file is not None and not Path(self.prompt_file).is_file():
            raise UserError(f"prompt_file={self.prompt_file}: there is no such file; check the path")
        if self.prompt_file is None and not self.prompt.strip():
            raise UserError('prompt: there is nothing to answer; give for example prompt="Hello, who are you?"')

    def check_sampling(self) -> None:
        """The same for how an answer is drawn and where it ends."""
        between("max_new_tokens", self.max_new_tokens, 1, math.inf, "it must be at least 1; give for example 512")
        if self.temperature != 0 and not SMALLEST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature}: it can't be negative, or smaller than {SMALLEST_TEMPERATURE}; give 0 "
                f"for greedy, or for example 0.7"
            )
        between("top_p", self.top_p, ABOVE_0, 1, "it is a probability; give a number above 0, at most 1")
        between("top_k", self.top_k, 0, math.inf, "it can't be negative; give 0 for all tokens, or for example 50")
        share("min_p", self.min_p)
        positive("repetition_penalty", self.repetition_penalty, "1.1")
        for name, value, everything in (("top_p", self.top_p, 1), ("top_k", self.top_k, 0), ("min_p", self.min_p, 0)):
            if self.temperature == 0 and value != everything:
                raise UserError(
                    f"{name}={value}: temperature=0 takes the likeliest token whatever it is; give for "
                    f"example temperature=0.7 with it, or leave it out"
                )
        between("seed", self.seed, 0, 2**32 - 1, f"it must be from 0 to {2**32 - 1}; give for example 0")
        for text in self.stop:
            if not isinstance(text, str):  # OmegaConf lets a dictionary pass
                raise UserError(f"stop={text}: it is not a string; give a list of strings, as in 'stop=[END]'")
            if not text:
                raise UserError("stop=: an empty string would end every answer at once; leave it out")
            check_utf8("stop", text)
        choice("markers", self.markers, "reject", "keep")


def check_utf8(name: str, text: str) -> None:
    """Raises `UserError` if a text that the shell handed over holds bytes that are not UTF-8."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name}={text!r}: it is not UTF-8 text; check the terminal's encoding")
