"""The network over which a run's machines talk to each other."""

import os
import socket
import struct

from p2bw.contract.store import Place, Store

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


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
