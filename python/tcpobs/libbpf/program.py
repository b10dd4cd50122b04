"""Programs and the links that attach them."""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import c_bool, c_char, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_ulong, c_void_p

from tcpobs.libbpf.errors import LibbpfError
from tcpobs.libbpf.library import library
from tcpobs.libbpf.resource import Handle, Resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class ProgramInfo(ctypes.Structure):
    """struct bpf_prog_info of include/uapi/linux/bpf.h; what an older kernel does not know stays 0.

    `run_cnt` and `run_time_ns` count only while run statistics are on (see `RunStatistics`).
    `recursion_misses` counts the times the program was not entered because it, or another program of its
    kind, was already running on that CPU (Linux 5.12; for tracepoints and kprobes 6.7).
    """

    type: int
    id: int
    run_time_ns: int
    run_cnt: int
    recursion_misses: int
    verified_insns: int

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * 16),
        ("ifindex", c_uint32),
        ("gpl_compatible", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("nr_jited_ksyms", c_uint32),
        ("nr_jited_func_lens", c_uint32),
        ("jited_ksyms", c_uint64),
        ("jited_func_lens", c_uint64),
        ("btf_id", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("nr_func_info", c_uint32),
        ("nr_line_info", c_uint32),
        ("line_info", c_uint64),
        ("jited_line_info", c_uint64),
        ("nr_jited_line_info", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("jited_line_info_rec_size", c_uint32),
        ("nr_prog_tags", c_uint32),
        ("prog_tags", c_uint64),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
        ("recursion_misses", c_uint64),
        ("verified_insns", c_uint32),
        ("attach_btf_obj_id", c_uint32),
        ("attach_btf_id", c_uint32),
    ]


class Program(Handle):
    """A program of an object."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle)
        self.name: str = library().bpf_program__name(handle).decode()
        self.section: str = library().bpf_program__section_name(handle).decode()

    @property
    def type(self) -> int:
        """BPF_PROG_TYPE_* of include/uapi/linux/bpf.h."""
        return int(library().bpf_program__type(self.handle))

    @property
    def autoload(self) -> bool:
        """Whether loading the object loads this program. Can be set before loading."""
        return bool(library().bpf_program__autoload(self.handle))

    @autoload.setter
    def autoload(self, load: bool) -> None:
        library().bpf_program__set_autoload(self.handle, load)

    @property
    def fd(self) -> int:
        """The file descriptor, after loading."""
        return int(library().bpf_program__fd(self.handle))

    @property
    def info(self) -> ProgramInfo:
        """What the kernel says of the loaded program."""
        info = ProgramInfo()
        size = c_uint32(ctypes.sizeof(info))
        library().bpf_obj_get_info_by_fd(self.fd, ctypes.byref(info), ctypes.byref(size))
        return info

    @property
    def recursion_misses(self) -> int:
        """How often the kernel did not enter it (see ProgramInfo). Takes no capability, as `info` may.

        From the file descriptor's file in /proc, proc_pid_fdinfo(5); 0 where the kernel does not count, or
        does not let this process look at itself (before 5.14, with capabilities from its file).
        """
        try:
            with open(f"/proc/self/fdinfo/{self.fd}") as file:
                fields = dict(line.split(":", 1) for line in file)
        except PermissionError:
            return 0
        return int(fields.get("recursion_misses", 0))

    def run(self, *arguments: int) -> int:
        """Runs it once, now, without attaching it: a raw_tp program, with up to twelve 64-bit arguments.

        BPF_PROG_TEST_RUN of bpf(2), for raw_tp since Linux 5.10. Returns what the program returned.
        """
        context = (c_uint64 * len(arguments))(*arguments)
        options = _RunOptions(
            sz=ctypes.sizeof(_RunOptions),
            ctx_in=ctypes.addressof(context),
            ctx_size_in=ctypes.sizeof(context),
        )
        library().bpf_prog_test_run_opts(self.fd, ctypes.byref(options))
        return options.retval

    def attach(self) -> Link:
        """Attaches it to what its section names: tp_btf, tracepoint, kprobe, and all of libbpf's others."""
        return Link(library().bpf_program__attach(self.handle))

    def attach_kprobe(self, function: str, *, at_return: bool = False) -> Link:
        """Attaches it to a kernel function."""
        options = _ProbeOptions(sz=ctypes.sizeof(_ProbeOptions), retprobe=at_return)
        return Link(
            library().bpf_program__attach_kprobe_opts(self.handle, function.encode(), ctypes.byref(options))
        )

    def attach_kprobes(self, functions: Sequence[str], *, at_return: bool = False) -> Link:
        """Attaches it to many kernel functions at once (kprobe.multi, Linux 5.18)."""
        names = (c_char_p * len(functions))(*map(str.encode, functions))
        # Linux 6.18 crashes without cookies, when somebody reads the link's fdinfo in /proc.
        cookies = (c_uint64 * len(functions))()
        options = _MultiKprobeOptions(
            sz=ctypes.sizeof(_MultiKprobeOptions),
            syms=ctypes.cast(names, c_void_p),
            cookies=ctypes.cast(cookies, c_void_p),
            cnt=len(functions),
            retprobe=at_return,
        )
        return Link(library().bpf_program__attach_kprobe_multi_opts(self.handle, None, ctypes.byref(options)))

    def attach_uprobe(
        self, path: str, offset: int, *, pid: int = -1, cookie: int = 0, at_return: bool = False
    ) -> Link:
        """Attaches it to an offset in a file, for one process or (-1) for all that map it.

        `cookie` is what the program gets by bpf_get_attach_cookie() (Linux 5.15).
        """
        options = _UprobeOptions(sz=ctypes.sizeof(_UprobeOptions), bpf_cookie=cookie, retprobe=at_return)
        return Link(
            library().bpf_program__attach_uprobe_opts(
                self.handle, pid, os.fsencode(path), offset, ctypes.byref(options)
            )
        )

    def attach_uprobes(
        self, path: str, offsets: Sequence[int], *, pid: int = -1, at_return: bool = False
    ) -> Link:
        """Attaches it to many offsets at once (uprobe.multi, Linux 6.6); the cookies are 0, 1, 2..."""
        many = len(offsets)
        places, cookies = (c_ulong * many)(*offsets), (c_uint64 * many)(*range(many))
        options = _MultiUprobeOptions(
            sz=ctypes.sizeof(_MultiUprobeOptions),
            offsets=ctypes.cast(places, c_void_p),
            cookies=ctypes.cast(cookies, c_void_p),
            cnt=many,
            retprobe=at_return,
        )
        return Link(
            library().bpf_program__attach_uprobe_multi(
                self.handle, pid, os.fsencode(path), None, ctypes.byref(options)
            )
        )

    def attach_usdt(self, path: str, provider: str, name: str, *, pid: int = -1) -> Link:
        """Attaches it to a USDT probe of a file, wherever that has it; counts up its semaphore."""
        return Link(
            library().bpf_program__attach_usdt(
                self.handle, pid, os.fsencode(path), provider.encode(), name.encode(), None
            )
        )


class _RunOptions(ctypes.Structure):
    """struct bpf_test_run_opts of bpf.h, up to what is used."""

    retval: int

    _fields_ = [
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
    ]


class _LoadOptions(ctypes.Structure):
    """The start of struct bpf_prog_load_opts of bpf.h."""

    _fields_ = [
        ("sz", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_uint32),
        ("prog_btf_fd", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_ifindex", c_uint32),
        ("kern_version", c_uint32),
        ("attach_btf_id", c_uint32),
    ]


_TRACING, _FEXIT = 26, 25
"""BPF_PROG_TYPE_TRACING and BPF_TRACE_FEXIT of include/uapi/linux/bpf.h."""

_RETURN_0 = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
"""r0 = 0; exit."""


def takes_fexit() -> bool:
    """Whether the kernel takes fexit programs from this process, found out in a few µs.

    It is given one for the kernel's type 1, which is no function: EINVAL is for that, and any other error
    comes earlier, and for all of them.
    """
    options = _LoadOptions(sz=ctypes.sizeof(_LoadOptions), expected_attach_type=_FEXIT, attach_btf_id=1)
    arguments = (_TRACING, None, b"Dual BSD/GPL", _RETURN_0, len(_RETURN_0) // 8, ctypes.byref(options))
    try:
        os.close(library().bpf_prog_load(*arguments))
    except LibbpfError as error:
        return error.errno == errno.EINVAL
    return True


class _ProbeOptions(ctypes.Structure):
    """struct bpf_kprobe_opts of libbpf.h."""

    _fields_ = [
        ("sz", c_size_t),
        ("bpf_cookie", c_uint64),
        ("offset", c_size_t),
        ("retprobe", c_bool),
    ]


class _UprobeOptions(ctypes.Structure):
    """The start of struct bpf_uprobe_opts of libbpf.h."""

    _fields_ = [
        ("sz", c_size_t),
        ("ref_ctr_offset", c_size_t),
        ("bpf_cookie", c_uint64),
        ("retprobe", c_bool),
    ]


class _MultiKprobeOptions(ctypes.Structure):
    """The start of struct bpf_kprobe_multi_opts of libbpf.h."""

    _fields_ = [
        ("sz", c_size_t),
        ("syms", c_void_p),
        ("addrs", c_void_p),
        ("cookies", c_void_p),
        ("cnt", c_size_t),
        ("retprobe", c_bool),
    ]


class _MultiUprobeOptions(ctypes.Structure):
    """struct bpf_uprobe_multi_opts of libbpf.h."""

    _fields_ = [
        ("sz", c_size_t),
        ("syms", c_void_p),
        ("offsets", c_void_p),
        ("ref_ctr_offsets", c_void_p),
        ("cookies", c_void_p),
        ("cnt", c_size_t),
        ("retprobe", c_bool),
    ]


class Link(Resource):
    """An attachment. It ends with `close`, with the `with` block, or with the process."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def close(self) -> None:
        """Detaches the program."""
        handle, self._handle = self._handle, 0
        if handle:
            library().bpf_link__destroy(handle)


class RunStatistics(Resource):
    """While open, the kernel counts and times every program's runs (BPF_ENABLE_STATS, Linux 5.8)."""

    def __init__(self) -> None:
        self._fd: int = library().bpf_enable_stats(0)

    def close(self) -> None:
        """Stops it, unless somebody else wants it too."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
