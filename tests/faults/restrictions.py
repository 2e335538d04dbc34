"""What takes system calls away from a process: a seccomp filter, and being a user who may lock little memory."""

from __future__ import annotations

import ctypes
import os
import resource
import struct

__all__ = ["become_nobody", "deny_io_uring", "deny_pidfd_open"]

# The same on every architecture since Linux 5.1.
IO_URING_CALLS = (425, 426, 427)  # setup, enter, register
PIDFD_OPEN = 434

_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_LOAD_NUMBER = 0x20  # BPF_LD | BPF_W | BPF_ABS: seccomp_data.nr is at offset 0
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter(calls: tuple[int, ...], error: int) -> bytes:
    instructions = [(_LOAD_NUMBER, 0, 0, 0)]
    # On a match, over the calls not looked at yet and the return that allows.
    instructions += [(_JUMP_EQUAL, len(calls) - index, 0, call) for index, call in enumerate(calls)]
    instructions += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | error)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


def deny_io_uring(error: int) -> None:
    """From now on io_uring's system calls fail with ``error`` in this process, as under Docker's default profile."""
    _deny(IO_URING_CALLS, error)


def deny_pidfd_open(error: int) -> None:
    """From now on ``pidfd_open`` fails with ``error``, as under profiles older than Linux 5.3."""
    _deny((PIDFD_OPEN,), error)


def _deny(calls: tuple[int, ...], error: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter(calls, error)
    program = _Program(len(code) // 8, code)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    if libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(program), zero, zero) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def become_nobody(locked_memory: int | None = None) -> None:
    """Gives up root for good, and all but so many bytes of memory that may be locked.

    Done in a process that has imported what it needs: another user may not be able to read the interpreter's files.
    """
    if locked_memory is not None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (locked_memory, locked_memory))
    os.setgroups([])
    # A user of its own: locked memory is counted per user, and other tests may be at it at the same time.
    nobody = 100_000 + os.getpid()
    os.setresgid(nobody, nobody, nobody)
    os.setresuid(nobody, nobody, nobody)
