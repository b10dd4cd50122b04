"""Cuts a vmlinux.h down to what bpf/ reaches.

usage: trim.py FULL_VMLINUX_H PREPROCESSED... > vmlinux.h

FULL_VMLINUX_H is bpftool's dump of a kernel's types: one definition after another, a blank line between
them, none before what it holds by value. PREPROCESSED are the programs after the preprocessor ran
without any vmlinux.h; of these, the lines that come from bpf/ count. Kept are the structs and unions they
name, the enums whose constants they use, and everything those hold by value; of what is only pointed to,
the bare declaration.
"""

from __future__ import annotations

import re
import sys

# What libbpf's own BPF headers take for granted.
ALWAYS = {"__u8", "__s8", "__u16", "__s16", "__u32", "__s32", "__u64", "__s64"}
ALWAYS |= {"__be16", "__be32", "__be64", "__wsum", "bool", "bpf_map_type"}

HEADER = """\
/* Made by `make vmlinux` from {source}: the types that bpf/ reaches. Do not edit. */
#ifndef __VMLINUX_H__
#define __VMLINUX_H__

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
#endif

"""
FOOTER = """\
#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute pop
#endif

#endif /* __VMLINUX_H__ */
"""


def definitions(text: str) -> list[str]:
    """The definitions of a vmlinux.h, in order."""
    blocks = [block.strip("\n") for block in text.split("\n\n")]
    return [b for b in blocks if re.match(r"(struct|union|enum|typedef)\b", b) and b.endswith(";")]


def name(block: str) -> str:
    """What a definition defines; empty for an anonymous enum."""
    if block.startswith("typedef"):
        pointer = re.search(r"\(\*? ?(?:const )?(\w+)\)[\[(]", block)
        function = re.match(r"typedef [^(]*?(\w+)\(", block)
        plain = re.search(r"(\w+)(?:\[\w*\])*;$", block)
        found = pointer or function or plain
        assert found, block
        return found[1]
    found = re.match(r"(?:struct|union|enum) (\w+)", block)
    return found[1] if found else ""


def from_bpf(preprocessed: str) -> str:
    """The lines that come from bpf/."""
    lines, ours = [], False
    for line in preprocessed.splitlines():
        marker = re.match(r'# \d+ "([^"]*)"', line)
        if marker:
            ours = marker[1].startswith("bpf/")
        elif ours:
            lines.append(line)
    return "\n".join(lines)


def trim(full: str, programs: str) -> list[str]:
    """The definitions that the programs reach, in order."""
    blocks = definitions(full)
    named = {name(block): block for block in blocks if not re.match(r"(struct|union) \w+;", block)}
    constants = {
        constant: block
        for block in blocks
        if block.startswith("enum")
        for constant in re.findall(r"^\t(\w+) = ", block, re.MULTILINE)
    }
    words = set(re.findall(r"\w+", programs))
    reached = {named[word] for word in ALWAYS if word in named}
    reached |= {constants[word] for word in words if word in constants}
    reached |= {named[n] for n in re.findall(r"\b(?:struct|union|enum) (\w+)", programs) if n in named}
    reached |= {named[n] for n in words if n in named and named[n].startswith("typedef")}
    pending, pointed = list(reached), set()
    while pending:
        block = pending.pop()
        by_value = {n for n in re.findall(r"(?:struct|union|enum) (\w+) (?!\*|{)", block) if n in named}
        by_value |= {n for n in re.findall(r"\b\w+\b", block) if named.get(n, "").startswith("typedef")}
        pointed |= set(re.findall(r"((?:struct|union) \w+) \*", block))
        for found in {named[n] for n in by_value} - reached:
            reached.add(found)
            pending.append(found)
    declared = [f"{kind_and_name};" for kind_and_name in sorted(pointed)]
    return ["\n".join(declared)] + [block for block in blocks if block in reached]


def main() -> None:
    """Trims what the command line names."""
    full, *preprocessed = sys.argv[1:]
    programs = []
    for path in preprocessed:
        with open(path) as file:
            programs.append(from_bpf(file.read()))
    with open(full) as file:
        kept = trim(file.read(), "\n".join(programs))
    source = re.sub(r".*/(linux-bpf-dev[^/]*)/.*", r"Debian's \1", full)
    sys.stdout.write(HEADER.format(source=source) + "\n\n".join(kept) + "\n\n" + FOOTER)


main()
