"""Messages between ranks on one machine, through memory that both of them have mapped.

Gloo takes some 0.3 ms of a core for each message, however short, and copies it through the kernel
and back. Here the sender copies it once, and the receiver computes on it where it lies.
"""

import hashlib
import math
import mmap
import os
import secrets
import socket
import struct
import sys
from array import array
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from select import POLLIN, POLLOUT, poll
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor

_START = 64  # where a block's data begin; its first byte tells whether the receiver needs them
_RECORD = struct.Struct("<iq")  # a message's tag and block; or _BLOCK and the size of a new one
_BLOCK = -1
_RIGHTS = socket.CMSG_SPACE(array("i").itemsize)  # what comes with it: the block's file
_RANK = struct.Struct("<i")
_PEER = struct.Struct("iII")  # process, user and group at a socket's other end
_ID = 16  # bytes of a machine's identity, and of a rank's token


class Neighbour:
    """Another rank on this machine: a socket that tells of messages, and the blocks they lie in.

    Blocks are anonymous memory, gone with the last process that has mapped it. Every one is
    written by one side only, and again when no tensor of the other's lies in it any more.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.blocks: list[mmap.mmap] = []  # that this side writes
        self.own: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)  # a tag's, by number
        self.others: list[mmap.mmap] = []  # that the other side writes
        self.leases: dict[int, ReferenceType[memoryview]] = {}  # of the other side's blocks
        self.came: dict[int, deque[tuple[mmap.mmap, list[int]]]] = defaultdict(deque)

    def send(self, tag: int, tensor: Tensor, order: list[int]) -> None:
        """Copy a tensor whose dimensions are ordered in memory as told; OSError if it is gone.

        A tag's tensors are all of one type and shape, and ordered alike.
        """
        packed = tensor if order == sorted(order) else tensor.permute(order)
        free = (entry for entry in self.own[tag] if not self.blocks[entry[0]][0])
        number, place = next(free, None) or self._make(tag, packed)
        place.copy_(packed)
        self.blocks[number][0] = 1
        self._tell(_RECORD.pack(tag, number) + bytes(order))

    def receive(self, tag: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The next message of a tag, in the layout that it had; OSError if the sender is gone.

        Its block is free when the last tensor on it is gone, and with that the block's lease.
        """
        while not self.came[tag]:
            self._listen()
        block, order = self.came[tag].popleft()
        lease = memoryview(block)
        self.leases[id(block)] = ref(lease, lambda _: block.__setitem__(0, 0))
        if order == sorted(order):
            return _tensor(lease, dtype, shape)
        packed = _tensor(lease, dtype, [shape[d] for d in order])
        return packed.permute(sorted(range(len(order)), key=order.__getitem__))

    def _make(self, tag: int, like: Tensor) -> tuple[int, Tensor]:
        """A new block for a tag's messages, and the tensor that lies in it."""
        size = _START + like.numel() * like.itemsize
        memory = os.memfd_create("p2bw")
        os.ftruncate(memory, size)
        block = mmap.mmap(memory, size)
        self.blocks.append(block)
        self._tell(_RECORD.pack(_BLOCK, size), [memory])
        os.close(memory)
        place = _tensor(memoryview(block), like.dtype, like.shape)
        self.own[tag].append((len(self.blocks) - 1, place))
        return self.own[tag][-1]

    def _tell(self, record: bytes, files: Sequence[int] = ()) -> None:
        """Never wait for the other side alone: it may be telling something, too."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", files))] if files else []
        while True:
            try:
                self.connection.sendmsg((record,), rights, socket.MSG_DONTWAIT)
                return
            except BlockingIOError:
                waiting = poll()
                waiting.register(self.connection, POLLIN | POLLOUT)
                if waiting.poll()[0][1] & POLLIN:
                    self._listen()

    def _listen(self) -> None:
        record, rights, _, _ = self.connection.recvmsg(256, _RIGHTS)
        if not record:
            raise ConnectionError("its connection is closed")
        tag, number = _RECORD.unpack_from(record)
        if tag == _BLOCK:
            (memory,) = array("i", rights[0][2])
            self.others.append(mmap.mmap(memory, number))
            os.close(memory)
        else:
            self.came[tag].append((self.others[number], [*record[_RECORD.size :]]))


def find_neighbours(peers: Iterable[int], tag: int) -> dict[int, Neighbour]:
    """Those of the peers that are on this machine, connected. All of them call this together.

    What each needs to know of the others they tell by gloo, in messages of a tag of their own.
    """
    me, token = dist.get_rank(), secrets.token_bytes(_ID)
    listener = _listen_at(token)
    card = _machine() + token if listener else bytes(2 * _ID)
    told = torch.tensor([*card], dtype=torch.uint8)
    given = {peer: torch.empty_like(told) for peer in peers if peer != me}
    works = [dist.irecv(given[peer], peer, tag=tag) for peer in given]
    works += [dist.isend(told, peer, tag=tag) for peer in given]
    for work in filter(None, works):
        work.wait()
    if listener is None:
        return {}
    cards = {peer: bytes(told.tolist()) for peer, told in given.items()}
    near = [peer for peer, other in cards.items() if other[:_ID] == card[:_ID]]
    found = {}
    with listener:
        for peer in (peer for peer in near if peer < me):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect(b"\0p2bw" + cards[peer][_ID:])
            connection.send(_RANK.pack(me))
            found[peer] = Neighbour(connection)
        while len(found) < len(near):
            connection, _ = listener.accept()
            _, user, _ = _PEER.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            )
            if user == os.getuid():  # names in this space are open to all users
                found[_RANK.unpack(connection.recv(_RANK.size))[0]] = Neighbour(connection)
    return found


def _listen_at(token: bytes) -> socket.socket | None:
    """A socket for ranks of this machine to connect to; only Linux has all that this takes."""
    if sys.platform != "linux":
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(b"\0p2bw" + token)  # no file: the name is gone with the socket
    listener.listen(1024)
    return listener


def _machine() -> bytes:
    """What ranks have in common that can connect so: one boot of one machine, and its network."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    network = str(os.stat("/proc/self/ns/net").st_ino).encode()
    return hashlib.sha256(boot + network).digest()[:_ID]


def _tensor(block: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A block's data; the tensor keeps the memoryview alive."""
    if not (count := math.prod(shape)):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(block, dtype=dtype, offset=_START, count=count).view(shape)
