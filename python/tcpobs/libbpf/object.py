"""Objects: what clang compiled, opened, set up, and loaded into the kernel."""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import c_char_p, c_size_t

from tcpobs.libbpf.btf import Btf, Kind
from tcpobs.libbpf.errors import LibbpfError
from tcpobs.libbpf.library import library
from tcpobs.libbpf.map import Map
from tcpobs.libbpf.program import Link, Program
from tcpobs.libbpf.resource import Resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from tcpobs.libbpf.btf import Type, Value


class OpenOptions(ctypes.Structure):
    """The start of struct bpf_object_open_opts (libbpf.h): `sz` says how much of it this is."""

    _fields_ = [
        ("sz", c_size_t),
        ("object_name", c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", c_char_p),
        ("unused", ctypes.c_uint32),
        ("kconfig", c_char_p),
        ("btf_custom_path", c_char_p),
    ]


class MappedVariable(Resource):
    """A variable in memory that is shared with the programs: to read it takes no system call.

    Nor does it take a capability to map it, as it may to look it up.
    """

    def __init__(self, map: Map, offset: int, size: int) -> None:
        """`offset` and `size` are in bytes."""
        self._memory = mmap.mmap(map.fd, offset + size, prot=mmap.PROT_READ)
        self._offset = offset

    def read(self) -> bytes:
        """Its bytes now."""
        return self._memory[self._offset :]

    def close(self) -> None:
        """Unmaps it."""
        self._memory.close()


class Variables:
    """The global variables of an object by name: `.rodata`, `.data`, `.bss` and their like.

    Their place and type come from the object's BTF. They can be read at any time, once the object is loaded
    from the map that the programs use; and set, those of `.rodata` only until then.
    """

    def __init__(self, object: Object) -> None:
        self._object = object
        self._places: dict[str, tuple[Map, int, Type]] = {}
        for map in object.maps.values():
            # libbpf calls a section's map OBJECT.SECTION, the object's part cut to fit.
            _, dot, name = map.name.partition(".")
            section = object.btf.find(dot + name, Kind.DATASEC) if dot else None
            for variable in section.variables if section else ():
                self._places[variable.name] = (map, variable.offset, variable.type)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Value:
        return self._place(name)[2].unpack(self.read(name))

    def read(self, name: str) -> bytes:
        """A variable's bytes, as the program has them."""
        map, offset, type = self._place(name)
        if not self._object.loaded:
            return ctypes.string_at(map.memory + offset, type.size)
        with self.mapped(name) as mapped:
            return mapped.read()

    def mapped(self, name: str) -> MappedVariable:
        """A variable of the loaded object, to be read often."""
        map, offset, type = self._place(name)
        return MappedVariable(map, offset, type.size)

    def __setitem__(self, name: str, value: Value) -> None:
        map, offset, type = self._place(name)
        if not self._object.loaded:
            ctypes.memmove(map.memory + offset, type.pack(value), type.size)
            return
        try:
            with mmap.mmap(map.fd, offset + type.size) as values:
                values[offset : offset + type.size] = type.pack(value)
        except PermissionError:
            raise LibbpfError(f"{name} is constant once the object is loaded") from None

    def _place(self, name: str) -> tuple[Map, int, Type]:
        if name not in self._places:
            raise LibbpfError(f"the object has no variable {name}")
        return self._places[name]


class Object(Resource):
    """A BPF object. Open it, set it up, load it, attach its programs; closing undoes all of it.

    with Object(data, "life") as object:
        object.variables["only_pid"] = 1
        object.load()
        object.attach("life_tp_btf")
    """

    def __init__(self, data: bytes, name: str, btf: str | None = None) -> None:
        """Opens an object from an ELF file's bytes.

        `name` begins the names of its maps in the kernel. `btf` is a file with the kernel's types, for a
        kernel that does not carry them itself.
        """
        options = OpenOptions(
            sz=ctypes.sizeof(OpenOptions),
            object_name=name.encode(),
            btf_custom_path=os.fsencode(btf) if btf else None,
        )
        self.loaded = False
        self._links: list[Link] = []
        self.programs: dict[str, Program] = {}
        self.maps: dict[str, Map] = {}
        self.btf = Btf(0, owned=False)
        self._handle: int = library().bpf_object__open_mem(data, len(data), ctypes.byref(options))
        try:
            types = library().bpf_object__btf(self._handle)
            if not types:
                raise LibbpfError(f"the object {name} carries no BTF")
            self.btf = Btf(types, owned=False)
            self.programs = {p.name: p for p in map(Program, self._each("bpf_object__next_program"))}
            self.maps = {m.name: m for m in map(Map, self._each("bpf_object__next_map"))}
            self.variables = Variables(self)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_file(cls, path: str, name: str, btf: str | None = None) -> Object:
        """Opens an object file."""
        with open(path, "rb") as file:
            return cls(file.read(), name, btf)

    def _each(self, following: str) -> Iterator[int]:
        """The handles that one of libbpf's bpf_object__next_... functions walks through."""
        handle = None
        while handle := getattr(library(), following)(self._handle, handle):
            yield handle

    def load(self) -> None:
        """Creates the maps and loads the programs whose autoload is on.

        Raises LibbpfError; its log has what the verifier said.
        """
        if not self._handle:
            raise LibbpfError("the object is closed")
        library().bpf_object__load(self._handle)
        self.loaded = True

    def attach(self, program: str) -> Link:
        """Attaches a program by name. The link closes with the object, if not before."""
        return self.keep(self.programs[program].attach())

    def keep(self, link: Link) -> Link:
        """Has a link of one of its programs end with it."""
        self._links.append(link)
        return link

    def detach(self) -> None:
        """Detaches the programs; they stay loaded, and the maps readable."""
        while self._links:
            self._links.pop().close()

    def close(self) -> None:
        """Detaches the programs, unloads them, frees the maps."""
        self.detach()
        self.loaded = False
        handle, self._handle = self._handle, 0
        if handle:
            for part in (*self.programs.values(), *self.maps.values(), self.btf):
                part.forget()
            library().bpf_object__close(handle)


def strip_dwarf(source: str, target: str) -> None:
    """Writes an object again without its DWARF; BTF, relocations and symbols stay (libbpf's linker)."""
    linker = library().bpf_linker__new(target.encode(), None)
    try:
        library().bpf_linker__add_file(linker, source.encode(), None)
        library().bpf_linker__finalize(linker)
    finally:
        library().bpf_linker__free(linker)
