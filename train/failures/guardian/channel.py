"""How guardians talk: lines of JSON over pipes and sockets, and a page shared with the training process."""

import contextlib
import json
import os
import struct
from typing import Any

POSITION = struct.Struct("<qqd32s")
"""What the training process writes into the shared page: step, moves within the step, since when it is there, phase."""

DISK = struct.Struct("<qd240s")
"""After that, for each of some threads: the thread while it waits for a disk (0 if it doesn't), since when, and the end
of the path."""

THREADS = 4
"""That may wait for a disk at once: the main one, and those that write checkpoints and metrics.jsonl."""

PAGE_BYTES = POSITION.size + THREADS * DISK.size

START = -1
"""The step of a process that has not begun with its first one: it reads, hashes, downloads, compiles, joins."""

JOIN_TIMEOUT = 30.0
"""Seconds within which process 0's guardian has to take a connection."""

PAUSE = 5
"""A guardian that slept for so many beat intervals was itself held up, and blames nobody for what it did not hear."""

LONGEST_LINE = 1 << 16

REMEDY = "launch it again with the same run_dir: it goes on from its last checkpoint"


def beat_interval(peer_timeout: float) -> float:
    """Seconds between two signs of life."""
    return min(1.0, peer_timeout / 10)


class Channel:
    """Lines of JSON over file descriptors; sending never blocks."""

    def __init__(self, reading: int, writing: int):
        """Reads from one descriptor, writes to the other; they may be the same socket."""
        self.reading = reading
        self._writing = writing
        self._rest = b""
        self._unsent = b""
        """The part of the last line that a full socket did not take."""
        os.set_blocking(writing, False)

    def send(self, **fields: object) -> None:
        """Sends a whole line or nothing. What can't be written is lost; reading tells if the other side is gone."""
        line = json.dumps(fields).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._unsent = self._unsent[os.write(self._writing, self._unsent) :] if self._unsent else b""
            if not self._unsent:
                self._unsent = line[os.write(self._writing, line) :]

    def receive(self) -> list[dict[str, Any]] | None:
        """The lines that have come; None at the end, or if the other side does not send lines of JSON."""
        try:
            data = os.read(self.reading, LONGEST_LINE)
            *lines, self._rest = (self._rest + data).split(b"\n")
            parsed = [json.loads(line) for line in lines]
        except BlockingIOError:
            return []
        except (OSError, ValueError, RecursionError):
            return None
        understood = all(isinstance(fields, dict) for fields in parsed) and len(self._rest) <= LONGEST_LINE
        return parsed if data and understood else None
