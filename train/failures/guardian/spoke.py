"""The guardian of any process but 0: it reports to the hub and hears its verdict."""

import mmap
import selectors
import socket
import sys
from typing import Any, NoReturn

from train.failures.guardian.channel import Channel
from train.failures.guardian.guardian import Guardian, duration


class Spoke(Guardian):
    """The guardian of any process but 0."""

    def __init__(self, setup: dict[str, Any], trainer: Channel, page: mmap.mmap, connection: socket.socket):
        """`connection` leads to the hub."""
        super().__init__(setup, trainer, page)
        self.connection = connection  # which closes when nothing holds it
        self.hub = Channel(connection.fileno(), connection.fileno())
        self.hub_heard = self.now
        self.hub_position = "its start"
        self.speaks = True
        self.selector.register(connection, selectors.EVENT_READ, self.hear_hub)
        about = {key: setup[key] for key in ("token", "rank", "local_rank", "host", "site")}
        self.hub.send(**about)

    def forgive(self, now: float) -> None:
        super().forgive(now)
        self.hub_heard = now

    def report(self, **events: object) -> None:
        self.hub.send(**self.status(), **events)

    def tick(self) -> None:
        self.report()
        if self.now - self.hub_heard > self.peer_timeout:
            silence = f"process 0 has not been heard of for {duration(self.peer_timeout)}"
            self.end(f"{silence} (its machine or the network is gone); it was last in {self.hub_position}")

    def hear_hub(self) -> None:
        """Takes what the hub says."""
        lines = self.hub.receive()
        if lines is None:
            lost = "the connection to process 0 was lost (its machine or its guardian is gone)"
            self.end(f"{lost}; it was last in {self.hub_position}")
        self.hub_heard = self.now
        for line in lines:
            if "position" in line:
                self.hub_position, self.speaks = line["position"], line["speaks"]
            elif "ready" in line:
                self.trainer.send(ready=True)
            elif "end" in line:
                self.trainer.send(end=True)
                sys.exit()
            elif "verdict" in line:
                self.speaks = line["speaks"]
                self.end(line["verdict"], line["code"])

    def end(self, verdict: str, code: int | None = None) -> NoReturn:
        """Ends the training process and this one."""
        self.end_trainer(verdict, code, self.speaks)
        sys.exit()
