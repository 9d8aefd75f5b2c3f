"""What an exception in one process means, for this process and for the others."""

import contextlib
import errno
import sys
from collections.abc import Iterator

import torch

from configs.program.entry import EXIT_USER_ERROR
from configs.program.errors import UserError, one_line, say
from train.config.train import TrainConfig
from train.failures.guard import Guard

KNOBS = (
    "a smaller micro_batch (global_batch keeps the step the same), activation_checkpointing=full, rows of fewer tokens "
    "(seq_len of `python -m data`), or deepspeed=zero3_offload"
)
"""Settings that make a step need less memory."""

MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
"""Words in the errors of torch's allocator, CUDA and cuBLAS when memory runs out."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

EXIT_FAULT = 1
"""Python's own exit code for an exception that nothing catches."""

UNISON = 2.0
"""Seconds within which all processes have found a mistake of the user's that they all can find."""

PEER_SECONDS = 10.0
"""Seconds that an error which a peer's death may have caused waits for the guard to say so."""


@contextlib.contextmanager
def reporting_errors(guard: Guard, config: TrainConfig, process_rank: int) -> Iterator[None]:
    """Within it, an error is reported to the user once, in a sentence, and the other processes learn the reason.

    Raises:
        UserError: the disk is full, or the input is wrong.
        SystemExit: memory was too small (2), or another process ended the run (the guard's exit code).
    """
    try:
        yield
    except UserError as error:
        guard.leaving(str(error), EXIT_USER_ERROR, after=UNISON)
        raise
    except OSError as error:
        is_full = error.errno in NO_SPACE
        guard.leaving(one_line(error), EXIT_USER_ERROR if is_full else EXIT_FAULT)
        if is_full:
            raise UserError(
                f"run_dir{f'={config.run_dir}' if config.run_dir else ''}: it can't be written ({error.strerror}); "
                f"checkpoints that are there are untouched: free space or make it writable, and launch it again with "
                f"the same run_dir"
            ) from error
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            guard.leaving("out of memory", EXIT_USER_ERROR)
            say(
                "train",
                f"micro_batch={config.micro_batch}: process {process_rank} ran out of memory; give it "
                f"{KNOBS}; the same command then goes on from the last checkpoint, with what changed in resume_despite",
            )
            sys.exit(EXIT_USER_ERROR)
        # A collective mostly fails because of the process at its other end.
        if guard.verdict_within(PEER_SECONDS) is not None:
            sys.exit(guard.exit_code)
        guard.leaving(f"{type(error).__name__}: {one_line(error)}", EXIT_FAULT)
        raise
    except Exception as error:
        guard.leaving(f"{type(error).__name__}: {one_line(error)}", EXIT_FAULT)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in said for sign in MEMORY)
