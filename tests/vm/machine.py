"""A virtual machine with another kernel: it runs one command, on a root that it shares with this machine.

The root is read-only to it, over virtiofs, below an overlay in its memory, so what it changes is gone when it
ends. Software emulation (TCG): it needs neither /dev/kvm nor hardware of its own.

usage: python -m vm.machine NAME COMMAND   (`make vm KERNEL=NAME CMD=COMMAND`)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import NamedTuple

from vm import kernels
from vm.compiler import CLANG, Compiler
from vm.kernels import Kernel
from vm.packages import BUILD, ROOT, PackageError
from vm.roots import RootError, arm64_root

# In Debian 12 it is part of qemu, later a package of its own.
VIRTIOFSD = next(filter(os.path.exists, ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")), "virtiofsd")

DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""So that nothing is left of a run that was killed; and Ctrl-C is ours alone."""

MODULES = ("virtio_pci", "virtio_mmio", "virtio_console", "overlay", "virtiofs")
"""What the first process needs; where the kernel has it built in, there is no module to load."""

MEMORY = "2G"

MACHINES = {
    "amd64": (
        *("qemu-system-x86_64", "-M", "q35,memory-backend=memory", "-cpu", "Nehalem"),
        *("-append", "console=ttyS0 no_timer_check tsc=reliable"),
    ),
    "arm64": (
        *("qemu-system-aarch64", "-M", "virt,gic-version=3,memory-backend=memory"),
        *("-cpu", "neoverse-n1", "-append", "console=ttyAMA0"),  # max takes longer to emulate
    ),
}
"""The last argument begins the kernel's command line."""

# One CPU, of an early model, and nothing that a test does not need: each of these takes time to emulate.
BOOT = (
    "quiet panic=-1 mitigations=off nokaslr norandmaps randomize_kstack_offset=off init_on_alloc=0 nowatchdog"
    " random.trust_cpu=on audit=0 apparmor=0 selinux=0 cryptomgr.notests rcupdate.rcu_expedited=1"
    " net.ifnames=0"
)


class MachineError(Exception):
    """A machine that did not run its command to the end. `begun`: it had begun with it."""

    def __init__(self, message: str, begun: bool = False) -> None:
        super().__init__(message)
        self.begun = begun


stopping = threading.Event()
"""Set to end all machines, and let none begin."""


class Done(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str
    seconds: float


def run(
    kernel: Kernel, command: str, root: Path = Path("/"), seconds: float = 600, echo: bool = False
) -> Done:
    """Boots the kernel on this root, and runs a shell command in the checkout's folder.

    One boot in about ninety panics under emulation, so booting is tried twice. `echo` shows what the command
    prints as it comes. Raises MachineError when no exit status comes back.
    """
    try:
        return _run(kernel, command, root, seconds, echo)
    except MachineError as error:
        if error.begun or stopping.is_set():
            raise
        print(f"{kernel.name}: trying again: {error}", file=sys.stderr)
        return _run(kernel, command, root, seconds, echo)


def _run(kernel: Kernel, command: str, root: Path, seconds: float, echo: bool) -> Done:
    start = time.monotonic()
    jobs = BUILD / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{kernel.name}-", dir=jobs) as temporary:
        job = Path(temporary)
        (job / "command").write_text(command + "\n")
        (job / "run").write_text(
            _RUN.format(job=quote(str(job)), folder=quote(str(ROOT)), clang=quote(str(CLANG)))
        )
        for name in ("out", "err", "status", "begun", "console"):
            (job / name).touch()
        share = _share(root, job)
        compiler = Compiler(job / "compiler")
        try:
            machine = subprocess.Popen(
                [*DIE_WITH_US, *_qemu(kernel, job, root)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                _wait(machine, job, start + seconds, echo)
            finally:
                machine.kill()
                said = machine.communicate()[1].decode(errors="replace")
        finally:
            compiler.close()
            share.kill()
            share.wait()
        status = (job / "status").read_text().strip()
        if not status:
            console = (job / "console").read_text(errors="replace").splitlines()
            last = "\n".join([*said.splitlines(), *console][-20:])
            message = f"no exit status after {time.monotonic() - start:.0f} s\n{last}"
            raise MachineError(message, begun=bool((job / "begun").read_text()))
        out, err = ((job / name).read_text(errors="replace") for name in ("out", "err"))
        return Done(int(status), out, err, time.monotonic() - start)


# The names of the devices differ; the number after the p is that of the port in _qemu.
_RUN = """\
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LANG=C.UTF-8
export TCPOBS_CLANG={clang}
out=$(echo /dev/vport*p1) err=$(echo /dev/vport*p2) status=$(echo /dev/vport*p3) begun=$(echo /dev/vport*p4)
cd {folder}
echo yes >"$begun"
/bin/bash {job}/command </dev/null >"$out" 2>"$err"
echo $? >"$status"
sync
echo b >/proc/sysrq-trigger
"""


def _wait(machine: subprocess.Popen[bytes], job: Path, end: float, echo: bool) -> None:
    """Until the machine ends or the time is over; shows its output meanwhile if asked to."""
    shown = dict.fromkeys(("out", "err"), 0) if echo else {}
    while True:
        ended = machine.poll() is not None
        for name in shown:
            with open(job / name, "rb") as file:
                file.seek(shown[name])
                text = file.read()
            stream = sys.stdout if name == "out" else sys.stderr
            stream.buffer.write(text)
            stream.flush()
            shown[name] += len(text)
        if ended or time.monotonic() > end or stopping.is_set():
            return
        time.sleep(0.05)


def _share(root: Path, job: Path) -> subprocess.Popen[bytes]:
    """Starts virtiofsd on the root, with the checkout at its own path in it."""
    view, checkout = job / "view", str(ROOT)
    view.mkdir()
    inside = view / checkout.lstrip("/")
    (root / checkout.lstrip("/")).mkdir(parents=True, exist_ok=True)
    script = (
        'mount --rbind "$1" "$2" && mount --bind "$3" "$4" && mount -o remount,bind,ro "$2" &&'
        ' shift 4 && exec "$@"'
    )
    command = [
        *DIE_WITH_US,
        *("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"),
        *(str(root), str(view), checkout, str(inside)),
        *(VIRTIOFSD, f"--socket-path={job}/share", "-o", f"source={view}"),
        *("-o", "cache=always", "-o", "sandbox=chroot", "-o", "no_posix_lock"),
    ]
    with open(job / "share.log", "wb") as log:
        share = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
    end = time.monotonic() + 10
    while not (job / "share").exists():
        if share.poll() is not None or time.monotonic() > end:
            share.kill()
            raise MachineError(f"virtiofsd does not start: {(job / 'share.log').read_text()}")
        time.sleep(0.02)
    return share


def _qemu(kernel: Kernel, job: Path, root: Path) -> list[str]:
    *machine, console = MACHINES[kernel.architecture]
    ports = []
    for number, name in enumerate(("out", "err", "status", "begun"), 1):
        ports += ["-chardev", f"file,id={name},path={job}/{name}"]
        ports += ["-device", f"virtserialport,chardev={name},nr={number},name={name}"]
    ports += ["-chardev", f"socket,id=compiler,path={job}/compiler"]
    ports += ["-device", "virtserialport,chardev=compiler,nr=5,name=compiler"]
    return [
        *machine,
        f"{console} {BOOT} vm.job={job} vm.modules={kernel.modules}",
        *("-accel", "tcg,thread=multi,tb-size=512", "-smp", "1", "-m", MEMORY),
        *("-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs(kernel, root))),
        *("-serial", f"file:{job}/console"),
        *("-chardev", f"socket,id=share,path={job}/share"),
        *("-device", "vhost-user-fs-pci,chardev=share,tag=root"),
        *("-device", "virtio-serial-pci", *ports, "-device", "virtio-rng-pci"),
    ]


def initramfs(kernel: Kernel, root: Path) -> Path:
    """The file with `init`, the modules that it loads, and the root's busybox. Made once."""
    path = kernel.folder / "initramfs"
    parts = (Path(__file__).parent / "init", Path(__file__), root / "bin/busybox")
    if path.exists() and all(path.stat().st_mtime > part.stat().st_mtime for part in parts):
        return path
    with TemporaryDirectory(dir=kernel.folder) as temporary:
        tree = Path(temporary)
        for name in ("bin", "proc", "sys", "dev", "modules", "shared", "changes", "root"):
            (tree / name).mkdir()
        shutil.copy(parts[0], tree / "init")
        (tree / "init").chmod(0o755)
        shutil.copy(root / "bin/busybox", tree / "bin/busybox")
        order = []
        for module in _modules(kernel):
            name = module.name.removesuffix(".xz").removesuffix(".zst")
            order.append(name)
            unpack = {".xz": ["xz", "-dc"], ".zst": ["zstd", "-dcq"]}.get(module.suffix, ["cat"])
            with open(tree / "modules" / name, "wb") as file:
                subprocess.run([*unpack, str(module)], stdout=file, check=True)
        (tree / "modules/order").write_text("".join(f"{name}\n" for name in order))
        command = 'set -o pipefail; cd "$1" && find . | cpio --quiet -o -H newc | gzip -1 >"$2"'
        subprocess.run(["bash", "-c", command, "bash", str(tree), f"{path}.new"], check=True)
    os.replace(f"{path}.new", path)
    return path


def _modules(kernel: Kernel) -> list[Path]:
    """The files of the modules, in the order in which they can be loaded."""
    found: dict[Path, None] = {}
    for module in MODULES:
        command = ["modprobe", "-d", str(kernel.tree), "-S", kernel.release, "--show-depends", module]
        done = subprocess.run(command, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if line.startswith("insmod "):
                found[Path(line.split()[1])] = None
    return list(found)


def main(name: str, command: str) -> int:
    """Runs a command on the kernel of this name; returns its exit status."""
    found = [line for line in kernels.lines() if line.name == name]
    if not found:
        print(f"no kernel {name}: see {kernels.LIST.name}", file=sys.stderr)
        return 2
    try:
        kernel = kernels.find(found[0])
        if not kernel:
            print(f"{found[0].suite} has no release candidate now", file=sys.stderr)
            return 1
        root = arm64_root() if kernel.architecture == "arm64" else Path("/")
        return run(kernel, command, root, seconds=3600, echo=True).status
    except (MachineError, PackageError, RootError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main(*sys.argv[1:]))
