"""What a process that reads strangers' files gives up for good: the network, other programs and processes, writing.

Two means, each where the kernel allows it, each enough to keep it off the network: a network namespace of its own with
nothing in it (Linux lets anybody make one unless told otherwise), and a filter on system calls (seccomp), which needs
no right at all. Neither can be taken back. Elsewhere than on Linux nothing happens, and the result says so.

In: nothing. Out: what holds.
Next: hico_jax/serve/decoder.py
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

NAMESPACE, FILTER = "network namespace", "system call filter"

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # linux/sched.h
_NO_NEW_PRIVILEGES, _SECCOMP, _BY_PROGRAM = 38, 22, 2  # linux/prctl.h, linux/seccomp.h
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_LOAD, _AND, _EQUAL, _FROM, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # linux/filter.h
_NUMBER, _ARCH = 0, 4  # places in struct seccomp_data
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Calls of every architecture since io_uring are numbered alike: pidfd_send_signal, io_uring_setup, pidfd_open, openat2,
# pidfd_getfd, process_madvise, fchmodat2, setxattrat, removexattrat; what they can do is what the older calls below are
# refused.
_NEWER = (424, 425, 434, 437, 438, 440, 452, 463, 466)
# Per machine: its AUDIT_ARCH, refused calls, calls that open a file with the place of their flags, and calls about a
# process that are allowed about the caller (0).
_MACHINES: dict[str, tuple[int, tuple[int, ...], dict[int, int], tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        (
            41, 42, 49, 50, 53,  # socket connect bind listen socketpair
            59, 322, 62, 101, 310, 311,  # execve execveat kill ptrace process_vm_readv process_vm_writev
            200, 234, 129, 297,  # tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo
            141, 144, 203, 314,  # setpriority sched_setscheduler sched_setaffinity sched_setattr
            76, 77, 82, 83, 84, 85, 86, 87, 88,  # truncate ftruncate rename mkdir rmdir creat link unlink symlink
            90, 91, 92, 93, 94, 132, 133, 235,  # chmod fchmod chown fchown lchown utime mknod utimes
            258, 259, 260, 261, 263, 264, 265, 266, 268, 280, 316,  # the same, relative to a folder
            188, 189, 190, 197, 198, 199,  # setxattr removexattr and theirs of links and open files
            165, 272, 308, 321,  # mount unshare setns bpf
        ),
        {2: 1, 257: 2},
        (302,),  # prlimit64
    ),
    "aarch64": (
        0xC00000B7,
        (
            198, 199, 200, 201, 203,  # socket socketpair bind listen connect
            221, 281, 129, 117, 270, 271,  # execve execveat kill ptrace process_vm_readv process_vm_writev
            130, 131, 138, 240,  # tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo
            140, 119, 122, 274,  # setpriority sched_setscheduler sched_setaffinity sched_setattr
            5, 6, 7, 14, 15, 16,  # setxattr removexattr and theirs of links and open files
            33, 34, 35, 36, 37, 38, 45, 46, 276,  # mknodat mkdirat unlinkat symlinkat linkat renameat (f)truncate
            52, 53, 54, 55, 88,  # fchmod fchmodat fchownat fchown utimensat
            40, 97, 268, 280,  # mount unshare setns bpf
        ),
        {56: 2},
        (261,),  # prlimit64
    ),
}  # fmt: skip


def give_up() -> tuple[str, ...]:
    """Leave the network and the right to write, for good. Call it in a process of one thread.

    Returns:
      Which of the two means hold; with none the process is as free as before.
    """
    if sys.platform != "linux":
        return ()
    libc = ctypes.CDLL(None, use_errno=True)
    held = []
    if any(libc.unshare(how) == 0 for how in (_NEW_USER | _NEW_NET, _NEW_NET)):
        held.append(NAMESPACE)
    if _install(libc):
        held.append(FILTER)
    return tuple(held)


def _install(libc: ctypes.CDLL) -> bool:
    machine = platform.machine()
    if machine not in _MACHINES or sys.byteorder != "little" or sys.maxsize < 2**32:
        return False
    code = program(machine)
    count, buffer = len(code) // 8, ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_void_p))

    wanted = Program(count, ctypes.addressof(buffer))
    number = lambda value: ctypes.c_ulong(value)
    if libc.prctl(_NO_NEW_PRIVILEGES, number(1), number(0), number(0), number(0)) != 0:
        return False
    return libc.prctl(_SECCOMP, number(_BY_PROGRAM), ctypes.byref(wanted), number(0), number(0)) == 0


def program(machine: str) -> bytes:
    """The filter: another architecture's calls and those listed are refused, files open for reading alone."""
    arch, refused, opening, of_itself = _MACHINES[machine]
    refuse, one = struct.pack("<HBBI", _RETURN, 0, 0, _REFUSE), lambda *parts: struct.pack("<HBBI", *parts)
    code = [one(_LOAD, 0, 0, _ARCH), one(_EQUAL, 1, 0, arch), refuse, one(_LOAD, 0, 0, _NUMBER)]
    code += [one(_FROM, 0, 1, 0x40000000), refuse]  # x86-64's second set of numbers
    for call in (*refused, *_NEWER):
        code += [one(_EQUAL, 0, 1, call), refuse]
    for call, place in opening.items():
        code += [one(_EQUAL, 0, 4, call), one(_LOAD, 0, 0, 16 + 8 * place), one(_AND, 0, 0, _WRITING)]
        code += [one(_EQUAL, 1, 0, 0), refuse, one(_LOAD, 0, 0, _NUMBER)]
    for call in of_itself:
        code += [one(_EQUAL, 0, 3, call), one(_LOAD, 0, 0, 16), one(_EQUAL, 1, 0, 0), refuse]
        code += [one(_LOAD, 0, 0, _NUMBER)]
    return b"".join([*code, one(_RETURN, 0, 0, _ALLOW)])
