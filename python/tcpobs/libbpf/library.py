"""The shared library: finding it, its functions' prototypes, its messages, its errors.

Everything here follows libbpf's public headers (libbpf.h, btf.h, bpf.h). A call that fails raises
LibbpfError with what libbpf had to say about it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from ctypes import CFUNCTYPE, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

from tcpobs.libbpf.errors import LibbpfError, LibraryMissing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

NEEDED = (1, 0)
"""The oldest libbpf that has every function used here, with 1.0's way of reporting errors."""

PrintCallback = CFUNCTYPE(c_int, c_int, c_void_p, c_void_p)
"""libbpf_print_fn_t: level, format, va_list (a pointer on x86_64 and aarch64)."""

DumpCallback = CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)
"""btf_dump_printf_fn_t: context, format, va_list."""

# The kinds of results: a pointer that may be NULL, a pointer that may not, a status (negative on error),
# and plain values, which cannot fail.
MAYBE = "pointer or NULL"
POINTER = "pointer"
STATUS = "status"

PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    # objects
    "bpf_object__open_mem": (POINTER, [c_char_p, c_size_t, c_void_p]),
    "bpf_object__load": (STATUS, [c_void_p]),
    "bpf_object__close": (None, [c_void_p]),
    "bpf_object__btf": (MAYBE, [c_void_p]),
    "bpf_object__next_program": (MAYBE, [c_void_p, c_void_p]),
    "bpf_object__next_map": (MAYBE, [c_void_p, c_void_p]),
    # programs and links
    "bpf_program__name": (c_char_p, [c_void_p]),
    "bpf_program__section_name": (c_char_p, [c_void_p]),
    "bpf_program__type": (c_int, [c_void_p]),
    "bpf_program__autoload": (ctypes.c_bool, [c_void_p]),
    "bpf_program__set_autoload": (STATUS, [c_void_p, ctypes.c_bool]),
    "bpf_program__fd": (STATUS, [c_void_p]),
    "bpf_program__attach": (POINTER, [c_void_p]),
    "bpf_program__attach_uprobe_opts": (POINTER, [c_void_p, c_int, c_char_p, c_size_t, c_void_p]),
    "bpf_program__attach_uprobe_multi": (POINTER, [c_void_p, c_int, c_char_p, c_char_p, c_void_p]),
    "bpf_program__attach_kprobe_multi_opts": (POINTER, [c_void_p, c_char_p, c_void_p]),
    "bpf_program__attach_kprobe_opts": (POINTER, [c_void_p, c_char_p, c_void_p]),
    "bpf_program__attach_usdt": (POINTER, [c_void_p, c_int, c_char_p, c_char_p, c_char_p, c_void_p]),
    "bpf_program__attach_iter": (POINTER, [c_void_p, c_void_p]),
    "bpf_link__fd": (STATUS, [c_void_p]),
    "bpf_link__destroy": (STATUS, [c_void_p]),
    "bpf_iter_create": (STATUS, [c_int]),
    "bpf_prog_load": (STATUS, [c_int, c_char_p, c_char_p, c_char_p, c_size_t, c_void_p]),
    "bpf_prog_test_run_opts": (STATUS, [c_int, c_void_p]),
    "bpf_prog_get_fd_by_id": (STATUS, [c_uint32]),
    "bpf_obj_get_info_by_fd": (STATUS, [c_int, c_void_p, c_void_p]),
    "bpf_enable_stats": (STATUS, [c_int]),
    # maps
    "bpf_map__name": (c_char_p, [c_void_p]),
    "bpf_map__type": (c_int, [c_void_p]),
    "bpf_map__fd": (STATUS, [c_void_p]),
    "bpf_map__key_size": (c_uint32, [c_void_p]),
    "bpf_map__value_size": (c_uint32, [c_void_p]),
    "bpf_map__max_entries": (c_uint32, [c_void_p]),
    "bpf_map__set_max_entries": (STATUS, [c_void_p, c_uint32]),
    "bpf_map__autocreate": (ctypes.c_bool, [c_void_p]),
    "bpf_map__set_autocreate": (STATUS, [c_void_p, ctypes.c_bool]),
    "bpf_map__initial_value": (MAYBE, [c_void_p, c_void_p]),
    "bpf_map_create": (STATUS, [c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p]),
    "bpf_map_lookup_elem": (STATUS, [c_int, c_void_p, c_void_p]),
    "bpf_map_update_elem": (STATUS, [c_int, c_char_p, c_char_p, c_uint64]),
    "bpf_map_delete_elem": (STATUS, [c_int, c_char_p]),
    "bpf_map_get_next_key": (STATUS, [c_int, c_void_p, c_void_p]),
    "bpf_map_lookup_batch": (
        STATUS,
        [c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p],
    ),
    "bpf_map_lookup_and_delete_batch": (
        STATUS,
        [c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p],
    ),
    "libbpf_num_possible_cpus": (STATUS, []),
    # perf buffers
    "perf_buffer__new_raw": (POINTER, [c_int, c_size_t, c_void_p, c_void_p, c_void_p, c_void_p]),
    "perf_buffer__free": (None, [c_void_p]),
    "perf_buffer__buffer_cnt": (c_size_t, [c_void_p]),
    "perf_buffer__buffer_fd": (STATUS, [c_void_p, c_size_t]),
    "perf_buffer__buffer": (STATUS, [c_void_p, c_int, c_void_p, c_void_p]),
    # BTF
    "btf__load_vmlinux_btf": (POINTER, []),
    "btf__parse": (POINTER, [c_char_p, c_void_p]),
    "btf__free": (None, [c_void_p]),
    "btf__type_cnt": (c_uint32, [c_void_p]),
    "btf__type_by_id": (MAYBE, [c_void_p, c_uint32]),
    "btf__name_by_offset": (c_char_p, [c_void_p, c_uint32]),
    "btf__find_by_name_kind": (STATUS, [c_void_p, c_char_p, c_uint32]),
    "btf__resolve_size": (c_int64, [c_void_p, c_uint32]),
    "btf__raw_data": (POINTER, [c_void_p, c_void_p]),
    "btf_dump__new": (POINTER, [c_void_p, DumpCallback, c_void_p, c_void_p]),
    "btf_dump__dump_type": (STATUS, [c_void_p, c_uint32]),
    "btf_dump__free": (None, [c_void_p]),
    # the static linker
    "bpf_linker__new": (POINTER, [c_char_p, c_void_p]),
    "bpf_linker__add_file": (STATUS, [c_void_p, c_char_p, c_void_p]),
    "bpf_linker__finalize": (STATUS, [c_void_p]),
    "bpf_linker__free": (None, [c_void_p]),
    # the library itself
    "libbpf_major_version": (c_uint32, []),
    "libbpf_minor_version": (c_uint32, []),
    "libbpf_set_print": (c_void_p, [PrintCallback]),
}

LEVELS = ("warning", "info", "debug")


class Library:
    """libbpf.so.1, its functions as attributes: `library.bpf_object__load(handle)`."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._cdll = ctypes.CDLL(path, use_errno=True)
            self.version = self._version()
        except OSError as error:
            raise LibraryMissing(f"libbpf cannot be loaded: {error}") from None
        except AttributeError:
            raise LibraryMissing(f"{path} is not libbpf {NEEDED[0]}.{NEEDED[1]} or later") from None
        if self.version < NEEDED:
            found = ".".join(map(str, self.version))
            raise LibraryMissing(f"{path} is libbpf {found}, and {NEEDED[0]}.{NEEDED[1]} is needed")
        self.on_message: Callable[[str, str], None] | None = None
        """Called with each message's level (one of LEVELS) and text, if set; see `show_messages`."""
        self._messages: deque[str] = deque(maxlen=1000)
        self._vsnprintf = ctypes.CDLL(None).vsnprintf
        self._vsnprintf.argtypes = [c_void_p, c_size_t, c_void_p, c_void_p]
        self._print_callback = PrintCallback(self._print)
        self.libbpf_set_print(self._print_callback)

    def _version(self) -> tuple[int, int]:
        return self._cdll.libbpf_major_version(), self._cdll.libbpf_minor_version()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Binds a function at its first use, so that start-up pays for what it calls."""
        if name not in PROTOTYPES:
            raise AttributeError(name)
        function = getattr(self._cdll, name)
        result, function.argtypes = PROTOTYPES[name]
        if result is POINTER or result is MAYBE:
            function.restype = c_void_p
        else:
            function.restype = c_int if result is STATUS else result
        if result is POINTER:
            function.errcheck = self._check_pointer
        elif result is STATUS:
            function.errcheck = self._check_status
        setattr(self, name, function)
        bound: Callable[..., Any] = function
        return bound

    def _check_pointer(self, result: int | None, function: Any, _: object) -> int:
        if not result:
            raise self.error(function.__name__, ctypes.get_errno())
        return result

    def _check_status(self, result: int, function: Any, _: object) -> int:
        if result < 0:
            raise self.error(function.__name__, ctypes.get_errno() or -result)
        return result

    def error(self, what: str, errno: int) -> LibbpfError:
        """An error that takes along what libbpf has said since the last one."""
        log = "\n".join(self._messages)
        self._messages.clear()
        return LibbpfError(what, errno, log)

    def _print(self, level: int, text: int, arguments: int) -> int:
        if level < 2 or self.on_message:  # debug messages are many: format them only for a reader
            message = self.format(text, arguments).rstrip("\n")
            if level < 2:
                self._messages.append(message)
            if self.on_message:
                self.on_message(LEVELS[level], message)
        return 0

    def format(self, text: int, arguments: int) -> str:
        """What printf would make of a format and a va_list.

        Printing uses a va_list up, so each pass gets a copy (24 bytes on x86_64, 32 on aarch64).
        """
        saved = ctypes.string_at(arguments, 32)
        size: int = self._vsnprintf(None, 0, text, ctypes.create_string_buffer(saved, 32)) + 1
        buffer = ctypes.create_string_buffer(size)
        self._vsnprintf(buffer, size, text, ctypes.create_string_buffer(saved, 32))
        return buffer.value.decode(errors="replace")


def find() -> str:
    """The library's path: $TCPOBS_LIBBPF, else the one in the wheel."""
    bundled = os.path.join(os.path.dirname(os.path.dirname(__file__)), "_lib", "libbpf.so.1")
    return os.environ.get("TCPOBS_LIBBPF") or bundled


_library: Library | None = None


def library() -> Library:
    """The library, loaded at the first call."""
    global _library
    if _library is None:
        _library = Library(find())
    return _library


def show_messages() -> None:
    """Writes libbpf's messages to standard error from now on, debugging ones included."""
    library().on_message = lambda level, text: print(f"libbpf: {level}: {text}", file=sys.stderr)
