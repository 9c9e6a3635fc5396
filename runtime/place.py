"""Where torchrun has put this process, and how it finds the others."""

import os
import socket
import struct
from datetime import timedelta

import torch.distributed as dist

from p2bw.contract.errors import PeerError, UsageError
from p2bw.contract.job import Job, Options, command
from p2bw.contract.store import Place, Store

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


def find_place(job: Job) -> Place:
    try:
        return Place(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ.get("LOCAL_RANK", 0)),
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )
    except KeyError as missing:
        line = " ".join(command(job, Options(), ranks="N"))
        raise UsageError(
            f"{missing} is not set: the ranks are started by torchrun, as in {line}"
        ) from None


def connect(place: Place, timeout_s: float) -> Store:
    """The store that torchrun's agent keeps for its workers; it outlives their restarts."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise PeerError(f"no contact with {host}:{port}: {error}") from None
    shared: Store = dist.PrefixStore("p2bw", store)  # type: ignore[attr-defined]
    return shared


def within(store: Store, name: str | int) -> Store:
    """A part of the store that has its own keys."""
    part: Store = dist.PrefixStore(str(name), store)  # type: ignore[attr-defined, arg-type]
    return part


def choose_interface(place: Place, store: Store) -> None:
    """Let gloo talk over the network that leads to the other machines, the loopback on one.

    Its own choice is what the host's name resolves to, on many machines an address of no use.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = "127.0.0.1"
    if place.local_world < place.world:
        own = _address_towards(os.environ["MASTER_ADDR"])
        store.set(f"address/{place.rank}", own)
        if _is_loopback(own):  # the store is on this machine
            keys = [f"address/{rank}" for rank in range(place.world)]
            others = [found.decode() for found in store.multi_get(keys)]
            own = next((_address_towards(o) for o in others if not _is_loopback(o)), own)
    if name := _interface_of(own):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _address_towards(host: str) -> str:
    """This machine's address on the way to a host."""
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _interface_of(address: str) -> str | None:
    """The interface that has an IPv4 address; None if that cannot be found out."""
    names = [name for _, name in socket.if_nameindex()]
    if _is_loopback(address):
        return next((name for name in names if name in ("lo", "lo0")), None)
    try:
        from fcntl import ioctl
    except ImportError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            try:
                answer = ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
