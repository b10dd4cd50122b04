"""python -m tcpobs.libbpf.strip SOURCE TARGET: an object again, without its DWARF."""

import sys

from tcpobs.libbpf.object import strip_dwarf

strip_dwarf(*sys.argv[1:])
