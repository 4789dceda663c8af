"""Start of a probe's process: `python -m devices.child_start PARENT MODULE [ARGUMENT]`.

Binds the process to its parent before the module is imported, then runs it as the main one.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LEAST_ARGUMENTS = 2


def die_with(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent ends, however that ends.

    A parent that ended before the kernel was told is noticed afterwards. Systems other than Linux
    have no such request; there a probe ends with its own time limit.
    """
    if sys.platform != "linux":
        return
    number = ctypes.c_ulong(signal.SIGKILL)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """Run the module with what is left of the command line."""
    if len(arguments) < _LEAST_ARGUMENTS or not arguments[0].isdecimal():
        sys.exit("wanted: PARENT MODULE [ARGUMENT]")
    die_with(int(arguments[0]))
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
