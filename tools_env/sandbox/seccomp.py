"""The system call filter of the sandbox, as the BPF program that `bwrap --seccomp` reads.

Namespaces and dropped capabilities already prevent what is refused here. The filter also shields the kernel code behind
these calls, so that one flaw in it does not suffice to escape.
"""

import errno
import platform
import struct

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT0 = 0, 4, 16  # offsets in struct seccomp_data, little endian
_NAMESPACES = 0x7E020080  # the CLONE_NEW* flags of clone(2)
_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink: all confined by the network namespace, unlike vsock

# Numbers from the kernel's system call tables: (x86-64, generic table of aarch64).
_REFUSED = {
    "ptrace": (101, 117),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "open_by_handle_at": (304, 265),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
}
_MACHINES = {"x86_64": (0, 0xC000003E, 56, 41), "aarch64": (1, 0xC00000B7, 220, 198)}  # column, audit id, clone, socket
_CLONE3 = 435  # its flags are in memory, which a filter cannot read; ENOSYS makes the C library use clone


def filter_program() -> bytes | None:
    """Returns the filter for this machine, or None where its system call numbers are unknown."""
    if platform.machine() not in _MACHINES:
        return None
    column, architecture, clone, socket = _MACHINES[platform.machine()]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_AT_LEAST, 0, 1, 0x40000000),  # x32 variants of the same calls
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        *_if_equal(_CLONE3, (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)),
    ]
    for numbers in _REFUSED.values():
        code += _if_equal(numbers[column], (_RETURN, 0, 0, _ERRNO | errno.EPERM))
    code += [
        (_JUMP_EQUAL, 0, 4, clone),
        (_LOAD, 0, 0, _ARGUMENT0),
        (_JUMP_ANY_BIT, 0, 1, _NAMESPACES),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
        (_JUMP_EQUAL, 0, len(_FAMILIES) + 2, socket),
        (_LOAD, 0, 0, _ARGUMENT0),
        *((_JUMP_EQUAL, len(_FAMILIES) - i, 0, family) for i, family in enumerate(_FAMILIES)),
        (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *line) for line in code)


def _if_equal(number: int, then: tuple) -> list[tuple]:
    return [(_JUMP_EQUAL, 0, 1, number), then]
