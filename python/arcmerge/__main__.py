"""The command: `arcmerge`, or `python -m arcmerge`.

Signals are blocked before anything else is imported, and wait for their handlers. An interrupt in the start of Python
itself still shows a traceback.
"""

from __future__ import annotations

import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def run() -> NoReturn:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    import sys

    from arcmerge import interrupts

    interrupts.end_at_once("nothing was written")
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    from arcmerge.cli import main

    code = main()
    interrupts.ignore()
    sys.exit(code)


if __name__ == "__main__":
    run()
