"""How guardians talk: lines of JSON over pipes and sockets, and a page shared with the training process."""

import contextlib
import json
import os
import struct
from typing import Any

PLACE = struct.Struct("<qqd32s")
"""What the training process writes into the shared page: step, moves within the step, since when, phase."""

JOIN_TIMEOUT = 30.0
"""Seconds for which the hub waits for the others to connect, or `peer_timeout` if that is longer."""

PAUSE = 5
"""A guardian that slept for so many beat intervals was itself held up: what it did not hear, nobody failed to say."""

LONGEST_LINE = 1 << 16


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
        """Of the last line, what a full socket did not take."""
        os.set_blocking(writing, False)

    def send(self, **fields: object) -> None:
        """One line, or nothing of it. What can't be written is lost: that the other side is gone shows in reading."""
        line = json.dumps(fields).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._unsent = self._unsent[os.write(self._writing, self._unsent) :] if self._unsent else b""
            if not self._unsent:
                self._unsent = line[os.write(self._writing, line) :]

    def receive(self) -> list[dict[str, Any]] | None:
        """The lines that have come; None at the end, and where the other side does not speak in lines of JSON."""
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
