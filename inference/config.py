"""What generation can be told."""

from dataclasses import dataclass

from configs.errors import UserError


@dataclass(kw_only=True, slots=True)
class InferenceConfig:
    """Settings of `python -m inference`."""

    task: str = "generate"
    """What to do; `generate` streams one answer to stdout."""
    adapter: str | None = None
    """The adapter directory of a run (`runs/…/adapter`). Unset, the base answers alone."""
    base: str | None = None
    """The base model, a directory or a hub id; unset, the one that the adapter was trained on."""
    revision: str | None = None
    """The commit, tag or branch of a hub id; unset, the one that the adapter names."""
    prompt: str = ""
    """What the user says."""
    system: str | None = None
    """The system message, if there is to be one."""
    max_new_tokens: int = 512
    """Stops the answer after this many tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time (greedy); above 0 samples."""
    top_p: float = 1.0
    """Samples among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Samples among this many of the likeliest tokens; 0 means all."""
    seed: int = 0
    """Decides what is sampled."""
    dtype: str = "bfloat16"
    """`bfloat16` or `float32`."""
    device: str = "auto"
    """`auto` takes CUDA where there is a GPU; `cuda`, `cpu`."""

    def check(self) -> None:
        """Raises `UserError` for values that can't be used, alone or together."""
        if self.task != "generate":
            raise UserError(f"task={self.task}: there is no such task; use task=generate")
        if not self.prompt.strip():
            raise UserError('prompt: there is nothing to answer; give for example prompt="Hello, who are you?"')
        for name, text in (("prompt", self.prompt), ("system", self.system or "")):
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"{name}={text!r}: it is not UTF-8 text; check the terminal's encoding")
        if self.adapter is None and self.base is None:
            raise UserError("adapter: no model is named; give adapter=runs/…/adapter, or base= for a model without one")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: it must be at least 1; give for example 512")
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature}: it can't be negative; give 0 for greedy, or such as 0.7")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: it is a probability; give a number above 0, to 1")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: it can't be negative; give 0 for all tokens, or such as 50")
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"dtype={self.dtype}: there is no such choice; choose bfloat16 or float32")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device={self.device}: there is no such choice; choose auto, cpu or cuda")
