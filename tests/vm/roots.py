"""Root directories for VMs of another architecture than this machine's.

Debian's packages are unpacked and never configured: nothing of theirs can run here, and to configure them in
the VM takes minutes under emulation. The little that their maintainer scripts would have made, and that the
live tests need, is made here.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from vm.packages import BUILD, KEYRING, ROOT

SUITE = "trixie"
PACKAGES = (
    "bash",
    "busybox-static",
    "coreutils",
    "iproute2",
    "kmod",
    "libbpf-tools",
    "libbpf1",
    "mount",
    "procps",
    "python3",
    "python3-pip",
    "python3-pytest",
    "python3-systemd",
    "python3-typing-extensions",
    "systemd",
    "util-linux",
)
"""What the live tests use, besides Debian's required packages; what these depend on comes along."""

ENVIRONMENT = Path("opt/tcpobs")
"""A virtual environment that sees Debian's packages too; a wheel's scripts land beside its python3."""


class RootError(Exception):
    """A root that could not be made."""


def arm64_root() -> Path:
    """A Debian for arm64 with what the live tests need, but for tcpobs. Made once.

    Raises RootError when it cannot be made; then nothing is left of it.
    """
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    root = BUILD / "roots" / f"arm64-{key}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="new-", dir=root.parent) as temporary:
            unfinished = Path(temporary) / "root"
            _unpack(_download("arm64", Path(temporary) / "packages"), unfinished)
            _configure(unfinished)
            _make_environment(unfinished)
            unfinished.rename(root)
    return root


def _download(architecture: str, folder: Path) -> list[Path]:
    """Fetches the packages. debootstrap checks the index's signature, and them against it."""
    mirror = _output([str(ROOT / "packaging/mirror")]).strip()
    command = ["debootstrap", "--download-only", f"--arch={architecture}", "--variant=minbase"]
    command += [f"--keyring={KEYRING}", f"--include={','.join(PACKAGES)}", SUITE, str(folder), mirror]
    _output(["unshare", "--mount", "--propagation", "private", *command])  # it mounts, and leaves that behind
    return sorted((folder / "var/cache/apt/archives").glob("*.deb"))


def _unpack(packages: list[Path], root: Path) -> None:
    root.mkdir()
    root.chmod(0o755)
    # base-files has the links from bin, lib and sbin to those in usr
    for package in sorted(packages, key=lambda path: not path.name.startswith("base-files_")):
        _output(["dpkg-deb", "-x", str(package), str(root)])


def _configure(root: Path) -> None:
    """Does what maintainer scripts would have done."""
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)
    (root / "etc/machine-id").write_text(f"{1:032x}\n")  # journald does not start without
    certificates = sorted((root / "usr/share/ca-certificates").glob("**/*.crt"))
    bundle = root / "etc/ssl/certs/ca-certificates.crt"  # pip reads it whenever it installs
    bundle.write_bytes(b"".join(path.read_bytes() for path in certificates))
    for tool in (root / "usr/sbin").glob("tcp*-libbpf"):  # the names that they have in Debian 12
        tool.with_name(tool.name.removesuffix("-libbpf")).symlink_to(tool.name)


def _make_environment(root: Path) -> None:
    environment = root / ENVIRONMENT
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python3").symlink_to("/usr/bin/python3")
    (environment / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise RootError(f"{command[0]}: exit status {done.returncode}: {' '.join(last)}")
    return done.stdout
