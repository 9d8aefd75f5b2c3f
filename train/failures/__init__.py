"""How a run ends badly, and how every process learns of it.

    signals.py  SIGTERM, SIGINT, SIGHUP: the first asks to finish the step and save, the second ends the process
    errors.py   what an exception in one process means, for this process and for the others
    guard.py    this process's part in noticing that another one is lost
    meeting.py  how the guards find each other, before anything else
    guardian/   the program beside each process that notices

May import train.config and configs.program. No code may stand in this file: the guardian's start imports it.
"""
