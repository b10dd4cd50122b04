"""Containers and units by the paths of their cgroups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs.cgroups import Container, container

ID = "3fa9c38a0e394e831dff200dc2479081232a6978376cc0e403428ab463bb14a2"
INNER = "c1f63f9e051667fe47f4fa7f6399aed75d57c59f911c48cf514281a43337b667"
POD = "0b8c6a54-2f5d-4f0e-9a37-6d1c5c1be1a9"
STATIC = "5f1c2a7e9b3d4680ac1e0f2b7d9c8e34"
"""The UID of a static pod: the kubelet's hash of its configuration."""

SLICED = POD.replace("-", "_")
BURSTABLE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICED}.slice"
USER = "/user.slice/user-1000.slice/user@1000.service"
KIND = (
    f"/system.slice/docker-{ID}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice"
    f"/kubelet-kubepods-besteffort-pod{SLICED}.slice"
)

CONTAINERS = {
    # Docker
    f"/docker/{ID}": ("docker", ID, None),
    f"/system.slice/docker-{ID}.scope": ("docker", ID, None),
    f"{USER}/user.slice/docker-{ID}.scope": ("docker", ID, None),
    f"/custom.slice/docker-{ID}.scope": ("docker", ID, None),
    f"/actions_job/{ID}": (None, ID, None),
    # containerd
    f"/default/{ID}": (None, ID, None),
    f"/system.slice/nerdctl-{ID}.scope": ("containerd", ID, None),
    f"{USER}/user.slice/nerdctl-{ID}.scope": ("containerd", ID, None),
    # podman
    f"/machine.slice/libpod-{ID}.scope": ("podman", ID, None),
    f"/machine.slice/libpod-{ID}.scope/container": ("podman", ID, None),
    f"/machine.slice/machine-libpod_pod_{INNER}.slice/libpod-{ID}.scope/container": ("podman", ID, None),
    f"/libpod_parent/libpod-{ID}": ("podman", ID, None),
    f"/libpod_parent/{INNER}/libpod-{ID}": ("podman", ID, None),
    f"{USER}/user.slice/libpod-{ID}.scope": ("podman", ID, None),
    f"/system.slice/web.service/libpod-payload-{ID}": ("podman", ID, None),
    f"{USER}/app.slice/web.service/libpod-payload-{ID}": ("podman", ID, None),
    # CRI-O without a pod of Kubernetes
    f"/crio/crio-{ID}": ("cri-o", ID, None),
    # Kubernetes, systemd's driver
    f"{BURSTABLE}/cri-containerd-{ID}.scope": ("containerd", ID, POD),
    f"{BURSTABLE}/docker-{ID}.scope": ("docker", ID, POD),
    f"{BURSTABLE}/crio-{ID}.scope": ("cri-o", ID, POD),
    f"{BURSTABLE}/crio-{ID}.scope/container": ("cri-o", ID, POD),
    f"{BURSTABLE}/libpod-{ID}.scope": ("podman", ID, POD),
    f"/kubepods.slice/kubepods-pod{SLICED}.slice/cri-containerd-{ID}.scope": ("containerd", ID, POD),
    f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/crio-{ID}.scope": (
        "cri-o",
        ID,
        STATIC,
    ),
    # Kubernetes, cgroupfs
    f"/kubepods/burstable/pod{POD}/{ID}": (None, ID, POD),
    f"/kubepods/besteffort/pod{POD}/crio-{ID}": ("cri-o", ID, POD),
    f"/kubepods/pod{POD}/{ID}": (None, ID, POD),
    f"/kubepods/burstable/pod{STATIC}/{ID}": (None, ID, STATIC),
    f"/node/kubepods/burstable/pod{POD}/{ID}": (None, ID, POD),
    # the kubelet with systemd's driver, containerd with cgroupfs
    f"/system.slice/containerd.service/kubepods-besteffort-pod{SLICED}.slice:cri-containerd:{ID}": (
        "containerd",
        ID,
        POD,
    ),
    # containers in containers, and systemd in one
    f"/docker/{INNER}/docker/{ID}": ("docker", ID, None),
    f"/system.slice/docker-{INNER}.scope/docker/{ID}": ("docker", ID, None),
    f"{BURSTABLE}/cri-containerd-{INNER}.scope/docker/{ID}": ("docker", ID, POD),
    f"{KIND}/cri-containerd-{INNER}.scope": ("containerd", INNER, POD),
    f"{KIND}": ("docker", ID, None),
    f"/docker/{ID}/kubelet/kubepods/burstable/pod{POD}/{INNER}": (None, INNER, POD),
    f"/docker/{ID}/system.slice/nginx.service": ("docker", ID, None),
    f"/machine.slice/libpod-{ID}.scope/container/init.scope": ("podman", ID, None),
    # as /proc/PID/cgroup has it in another cgroup namespace
    f"/../../kubepods/burstable/pod{POD}/{ID}": (None, ID, POD),
    f"docker/{ID}": ("docker", ID, None),
}

UNITS = {
    "/system.slice/nginx.service": ("nginx.service", None),
    "/system.slice/system-getty.slice/getty@tty1.service": ("getty@tty1.service", None),
    r"/system.slice/system-serial\x2dgetty.slice/serial-getty@ttyS0.service": (
        "serial-getty@ttyS0.service",
        None,
    ),
    r"/system.slice/dev-disk-by\x2duuid.service": (r"dev-disk-by\x2duuid.service", None),
    "/user.slice/user-1000.slice/session-3.scope": ("session-3.scope", None),
    USER: ("user@1000.service", None),
    f"{USER}/app.slice": ("user@1000.service", None),
    f"{USER}/app.slice/foo.service": ("foo.service", None),
    f"{USER}/init.scope": ("init.scope", None),
    "/init.scope": ("init.scope", None),
    "/system.slice/web.service/worker": ("web.service", None),
    "/system.slice/_cpu.service": ("cpu.service", None),  # escaped: the cpu controller's files begin so
    # beside containers
    "/system.slice/docker.service": ("docker.service", None),
    f"/system.slice/crio-conmon-{ID}.scope": (f"crio-conmon-{ID}.scope", None),
    f"{BURSTABLE}/crio-conmon-{ID}.scope": (f"crio-conmon-{ID}.scope", POD),
    f"/machine.slice/libpod-conmon-{ID}.scope": (f"libpod-conmon-{ID}.scope", None),
    "/system.slice/web.service/runtime": ("web.service", None),
    # like a container's, but not one
    "/system.slice/docker-.scope": ("docker-.scope", None),
    "/system.slice/docker-3fa9c38a0e39.scope": ("docker-3fa9c38a0e39.scope", None),
    f"/system.slice/docker-{ID.upper()}.scope": (f"docker-{ID.upper()}.scope", None),
    f"/system.slice/docker-{ID}0.scope": (f"docker-{ID}0.scope", None),
    f"/system.slice/my-docker-{ID}.scope": (f"my-docker-{ID}.scope", None),
    f"/system.slice/nginx.service/docker-{ID}.scope.d": ("nginx.service", None),
}

NOBODYS = [
    "",
    "/",
    "//",
    "/system.slice",
    "/user.slice/user-1000.slice",
    "/docker",
    "/docker/buildkit/k0cvsxv1mhcvz6tdm8bpsm1xd",
    f"/docker/{ID[:63]}",
    f"/docker/{ID.upper()}",
    f"/docker/{ID}0",
    "/default/redis",
    "/libpod_parent/conmon",
    f"/libpod_parent/{ID}",
    f"/libpod_parent/{ID}/conmon",
    f"/libpod_parent/libpod-conmon-{ID}",
    f"/kubepods/burstable/pod{POD}",
    f"/kubepods/burstable/pod{POD}/crio-conmon-{ID}",
    BURSTABLE,
    "/.service",
    "/.scope",
    # what no unit's name has
    "/system.slice/\x1b[2J.service",
    "/system.slice/two words.service",
    "/system.slice/a\nb.service",
    "/system.slice/nginx.service\n",
    f"/docker/{ID}\n",
    f"/system.slice/docker-{ID}.scope\n",
    "/system.slice/caf\udce9.service",
    "/system.slice/\u0661.service",
]


@pytest.mark.parametrize(("path", "expected"), CONTAINERS.items())
def test_container(path: str, expected: tuple[str | None, str, str | None]) -> None:
    assert container(path) == Container(*expected)


@pytest.mark.parametrize(("path", "expected"), UNITS.items())
def test_unit(path: str, expected: tuple[str, str | None]) -> None:
    unit, pod = expected
    assert container(path) == Container("systemd", unit, pod)


@pytest.mark.parametrize("path", NOBODYS)
def test_nobodys(path: str) -> None:
    assert container(path) is None


def test_a_pod_is_one_by_its_whole_name() -> None:
    for pod in (f"pod{POD}0", f"pod{POD[:-1]}", "pod", f"pod{POD.upper()}", f"xpod{POD}"):
        assert container(f"/kubepods/burstable/{pod}/{ID}") == Container(None, ID, None)
    assert container(f"/other/pod{POD}/{ID}") == Container(None, ID, None)
    assert container(f"/other.slice/other-pod{SLICED}.slice/crio-{ID}.scope") == Container("cri-o", ID, None)


def test_bytes_that_are_not_utf8_are_no_hindrance() -> None:
    path = f"/caf\udce9/docker-{ID}.scope/\udcff"
    assert container(path) == Container("docker", ID, None)


def test_a_long_path() -> None:
    deep = "/x" * 2000
    assert container(f"/system.slice/docker-{ID}.scope{deep}") == Container("docker", ID, None)
    assert container(deep) is None
    wide = "/" + "-" * 100_000 + "kubepods-pod" * 1000
    assert container(f"{wide}/{ID}") == Container(None, ID, None)


@given(st.text(alphabet=st.sampled_from(f"/{ID[:4]}-_.:@podslicervkub\n\\\x1b\udce9é"), max_size=200))
def test_what_is_told_is_safe_to_print(path: str) -> None:
    found = container(path)
    if found:
        assert found.runtime == "systemd"
        assert found.id.isascii()
        assert found.id.isprintable()
