"""How the guardians of a launch find each other, before anything else: process 0 leaves a note that all can read."""

import contextlib
import datetime
import json
import os
import sys

import torch
from torch._C._distributed_c10d import TCPStore

from configs.program.entry import EXIT_USER_ERROR
from configs.program.errors import UserError, say
from configs.program.launch import local_rank
from train.failures.guard import EXIT_PEER_LOST, Address, Guard
from train.failures.guardian.channel import REMEDY

NOTE = "guard"
TELL_WITHIN = 300.0
"""Seconds for which a process that has found a mistake waits for those that it has to tell."""


class Meeting:
    """The store of texts that torch keeps at MASTER_ADDR and MASTER_PORT: its processes join by it later."""

    begun = False
    """Whether this process has come to it."""

    def __init__(self, process_rank: int, *, seconds: float):
        """Opens it on process 0, or waits until that has come.

        Args:
            process_rank: the number of this process, from 0.
            seconds: how long it waits for process 0.

        Raises:
            UserError: another program uses the port.
            SystemExit: process 0 has not come.
        """
        Meeting.begun = True
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun has opened it already.
        opens = process_rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        try:
            self._store = TCPStore(
                address,
                port,
                is_master=opens,
                timeout=datetime.timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,  # torch opens it again in this process
            )
        except torch.distributed.DistError as error:
            if "EADDRINUSE" in str(error):
                raise UserError(
                    f"MASTER_PORT={port}: another program listens there, perhaps another run; name a port that is free "
                    f"on the first machine (deepspeed --master_port)"
                ) from error
            if local_rank() == 0:
                say(
                    "train",
                    f"MASTER_ADDR={address}: process 0 has not come to port {port} there within {seconds:g} seconds; "
                    f"see that it was launched and that both are right, and {REMEDY}",
                )
            sys.exit(EXIT_PEER_LOST)

    def join(self, guard: Guard) -> None:
        """Has the guardians of all processes find each other; collective.

        Raises:
            UserError: process 0's guardian can't be reached.
        """
        guard.join(self.address(guard))

    def address(self, guard: Guard) -> Address:
        """Where process 0's guardian is found; process 0 leaves it for the others."""
        if (where := guard.listen()) is not None:
            self._store.set(NOTE, json.dumps(where))
        port, token = json.loads(self._store.get(NOTE))
        return port, token


def tell_mistake(sentence: str, process_rank: int, process_count: int, *, within: float = TELL_WITHIN) -> None:
    """Tells the other processes of a mistake that this one met before it came to meet them.

    They end with its exit code too. One that does not come `within` these seconds finds nobody.
    """
    if Meeting.begun:
        return
    with contextlib.suppress(BaseException):  # the mistake is told here, and nothing takes its exit code from it
        guard = Guard(process_rank, process_count)
        meeting = Meeting(process_rank, seconds=within)
        guard.refuse(meeting.address(guard), sentence, EXIT_USER_ERROR, within=within)
