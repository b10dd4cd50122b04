"""Maps: their size before loading, their entries after."""

from __future__ import annotations

import ctypes
import errno
from enum import IntEnum

from tcpobs.libbpf.errors import LibbpfError
from tcpobs.libbpf.library import library
from tcpobs.libbpf.resource import Handle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = 4096
"""Entries asked for in one bpf_map_lookup_batch call, at most."""

BATCH_BYTES = 256 << 10
"""And bytes of values."""


class MapType(IntEnum):
    """BPF_MAP_TYPE_* of include/uapi/linux/bpf.h, those that mean something here."""

    HASH = 1
    ARRAY = 2
    PERF_EVENT_ARRAY = 4
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    SK_STORAGE = 24
    RINGBUF = 27


_NO_BATCHES = (errno.EINVAL, errno.EOPNOTSUPP, 524)  # 524: the kernel's ENOTSUPP
_PER_CPU = (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH)


class Map(Handle):
    """A map of an object. Keys and values are bytes, as the program sees them.

    In a per-CPU map a value is the values of all possible CPUs, one after another, each filled up to a
    multiple of eight bytes.
    """

    def __init__(self, handle: int) -> None:
        super().__init__(handle)
        self.name: str = library().bpf_map__name(handle).decode()

    @property
    def type(self) -> int:
        """BPF_MAP_TYPE_*: a MapType where that has it."""
        return int(library().bpf_map__type(self.handle))

    @property
    def max_entries(self) -> int:
        """The limit of entries; of a ring buffer, its bytes. Can be set before loading."""
        return int(library().bpf_map__max_entries(self.handle))

    @max_entries.setter
    def max_entries(self, entries: int) -> None:
        library().bpf_map__set_max_entries(self.handle, entries)

    @property
    def autocreate(self) -> bool:
        """Whether loading creates the map. Can be set before loading."""
        return bool(library().bpf_map__autocreate(self.handle))

    @autocreate.setter
    def autocreate(self, create: bool) -> None:
        library().bpf_map__set_autocreate(self.handle, create)

    @property
    def fd(self) -> int:
        """The file descriptor, after loading."""
        return int(library().bpf_map__fd(self.handle))

    @property
    def key_size(self) -> int:
        """Bytes."""
        return int(library().bpf_map__key_size(self.handle))

    @property
    def value_size(self) -> int:
        """Bytes of a value as user space reads it: of all CPUs, in a per-CPU map."""
        size = int(library().bpf_map__value_size(self.handle))
        if self.type in _PER_CPU:
            size = (size + 7) // 8 * 8 * library().libbpf_num_possible_cpus()
        return size

    @property
    def memory(self) -> int:
        """Where the values are in this process's memory, for a map of global variables; else 0."""
        size = ctypes.c_size_t()
        return library().bpf_map__initial_value(self.handle, ctypes.byref(size)) or 0

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        value = ctypes.create_string_buffer(self.value_size)
        try:
            library().bpf_map_lookup_elem(self.fd, self._checked(key, self.key_size), value)
        except LibbpfError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Sets the value of a key, new or not."""
        key = self._checked(key, self.key_size)
        library().bpf_map_update_elem(self.fd, key, self._checked(value, self.value_size), 0)

    def delete(self, key: bytes) -> None:
        """Removes a key; an error with ENOENT if it is not there."""
        library().bpf_map_delete_elem(self.fd, self._checked(key, self.key_size))

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key with its value, many a call where the kernel can (5.6 and later for a hash).

        While programs write, an entry may be missed or seen twice.
        """
        try:
            yield from self._batches()
        except LibbpfError as error:
            if error.errno not in _NO_BATCHES:
                raise
            yield from self._one_by_one()

    def take(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key with its value, each removed when it was read. For when no program writes."""
        try:
            yield from self._batches(take=True)
        except LibbpfError as error:
            if error.errno not in _NO_BATCHES:
                raise
            for key, value in list(self._one_by_one()):
                self.delete(key)
                yield key, value

    def _batches(self, *, take: bool = False) -> Iterator[tuple[bytes, bytes]]:
        look_up = library().bpf_map_lookup_and_delete_batch if take else library().bpf_map_lookup_batch
        key_size, value_size = self.key_size, self.value_size
        room = min(BATCH, self.max_entries, max(16, BATCH_BYTES // value_size))
        keys = ctypes.create_string_buffer(key_size * room)
        values = ctypes.create_string_buffer(value_size * room)
        position = ctypes.create_string_buffer(max(key_size, 8))
        start, more = None, True
        while more:
            count = ctypes.c_uint32(room)
            arguments = (start, position, keys, values, ctypes.byref(count), None)
            try:
                look_up(self.fd, *arguments)
            except LibbpfError as error:
                if error.errno == errno.ENOSPC:  # a hash bucket with more entries than there is room
                    room *= 2
                    keys = ctypes.create_string_buffer(key_size * room)
                    values = ctypes.create_string_buffer(value_size * room)
                    continue
                if error.errno != errno.ENOENT:
                    raise
                more = False  # ENOENT: these were the last
            start = position
            found_keys, found_values = keys.raw, values.raw
            for i in range(count.value):
                yield (
                    found_keys[i * key_size : (i + 1) * key_size],
                    found_values[i * value_size : (i + 1) * value_size],
                )

    def _one_by_one(self) -> Iterator[tuple[bytes, bytes]]:
        key = None
        following = ctypes.create_string_buffer(self.key_size)
        while True:
            try:
                library().bpf_map_get_next_key(self.fd, key, following)
            except LibbpfError as error:
                if error.errno == errno.ENOENT:
                    return
                raise
            key = following.raw
            value = self.lookup(key)
            if value is not None:
                yield key, value

    @staticmethod
    def _checked(data: bytes, size: int) -> bytes:
        """What libbpf gets: it copies `size` bytes whatever it is given: hand over no less."""
        if len(data) != size:
            raise LibbpfError(f"{len(data)} bytes where the map has {size}")
        return data
