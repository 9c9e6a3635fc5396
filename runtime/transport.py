"""Messages between ranks: one small interface, and its implementation over torch.distributed."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from p2bw.runtime.errors import PeerError
from p2bw.runtime.plan import TensorSpec
from p2bw.runtime.schedule import Channel, Flow


class Arrival(Protocol):
    """A receive that was posted; `wait` gives its tensor, in the memory layout of the sender's."""

    def wait(self) -> Tensor: ...


class Reduction(Protocol):
    """A sum over replicas that was started; `wait` returns when the tensors hold it."""

    def wait(self) -> None: ...


class Transport(Protocol):
    """What a worker needs of the world outside: the channels of its stage and its replicas."""

    def send(self, channel: Channel, tensor: Tensor) -> None:
        """Start to send; the caller may drop the tensor but not write to it."""

    def receive(self, channel: Channel) -> Arrival:
        """Post the receive of the channel's next message."""

    def reduce(self, tensors: Sequence[Tensor]) -> Reduction:
        """Start to replace the tensors by their sums over the replicas, the same bits on each."""

    def finish(self) -> None:
        """Wait until everything sent has arrived."""


class DistributedTransport:
    """Gloo on CPUs, NCCL on GPUs; a GPU without NCCL goes through host memory.

    Every message is the bytes of one tensor, in the order in which they lie in memory, received
    into a buffer of its own: autograd may adopt a received gradient as a parameter's `.grad`, so
    a buffer that is used again could change a gradient. A channel's first message is preceded by
    the order of the tensor's dimensions. Without it a transposed tensor would arrive contiguous,
    and kernels that look at strides would give other bits than the unsplit model.

    Sends are never waited for except by the next send on the same channel, whose predecessor has
    long arrived: receives are posted as far ahead as the schedule's check demands.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        specs: Mapping[Channel, TensorSpec],
        peers: Mapping[int, int],
        stage: int,
        device: torch.device,
        replicas: Sequence[Sequence[int]],
    ) -> None:
        """`channels`: all of the plan, the same on all ranks; `specs` of those of this stage.
        `peers`: rank of each stage in this replica. `replicas`: for each stage its ranks."""
        self.channels = channels
        self.specs = specs
        self.peers = peers
        self.device = device
        self.direct = dist.get_backend() == "nccl"  # moves device memory by itself
        self.tags = {channel: 2 * index for index, channel in enumerate(channels)}
        self.headers: dict[Channel, _Posted] = {}
        self.orders: dict[Channel, list[int]] = {}
        self.sending: dict[Channel, list[tuple[dist.Work, Tensor]]] = {}
        self.groups = self._connect() if self.direct else {}
        made = [dist.new_group(list(ranks)) for ranks in replicas] if len(replicas[0]) > 1 else []
        self.replicas = made[stage] if made else None

    def send(self, channel: Channel, tensor: Tensor) -> None:
        tensor, order = _dense(tensor.detach())
        payload = [_bytes(tensor)]
        if channel not in self.sending:
            payload.insert(0, _bytes(torch.tensor(order, dtype=torch.int64, device=tensor.device)))
        self._wait_for_sends(channel)
        self.sending[channel] = [
            (self._isend(channel, part, header=len(payload) - 1 - i), part)
            for i, part in enumerate(payload if self.direct else [part.cpu() for part in payload])
            if part.numel()
        ]

    def receive(self, channel: Channel) -> Arrival:
        spec = self.specs[channel]
        if channel not in self.headers:
            header = TensorSpec("", (len(spec.shape),), torch.int64)
            self.headers[channel] = self._post(channel, header, header=1)
        return _Reordered(self, channel, self._post(channel, spec, header=0))

    def order(self, channel: Channel) -> list[int]:
        """The order in memory of the dimensions of a channel's tensors."""
        if channel not in self.orders:
            self.orders[channel] = self.headers[channel].wait().tolist()
        return self.orders[channel]

    def reduce(self, tensors: Sequence[Tensor]) -> Reduction:
        return _AllReduce(tensors, self.replicas)

    def finish(self) -> None:
        for channel in self.sending:
            self._wait_for_sends(channel)

    def _post(self, channel: Channel, spec: TensorSpec, header: int) -> "_Posted":
        size = torch.Size(spec.shape).numel() * spec.dtype.itemsize
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device if self.direct else "cpu")
        peer, tag = self.peers[channel.source], self.tags[channel] + header
        work = None
        if size:
            with _blaming(channel, channel.source, peer):
                work = dist.irecv(buffer, peer, group=self.groups.get(_lane(channel)), tag=tag)
        return _Posted(channel, peer, buffer, spec, work, self.device)

    def _isend(self, channel: Channel, part: Tensor, header: int) -> dist.Work:
        peer, tag = self.peers[channel.target], self.tags[channel] + header
        with _blaming(channel, channel.target, peer):
            work = dist.isend(part, peer, group=self.groups.get(_lane(channel)), tag=tag)
        assert work is not None
        return work

    def _wait_for_sends(self, channel: Channel) -> None:
        for work, _ in self.sending.get(channel, ()):  # only once: the second time gloo hangs
            with _blaming(channel, channel.target, self.peers[channel.target]):
                work.wait()

    def _connect(self) -> dict[tuple[Flow, bool], dist.ProcessGroup]:
        """Give NCCL a communicator for each pair and direction, connected before it is needed.

        NCCL runs the messages of a communicator one after the other on one stream: a receive
        posted ahead would hold up a send that shares it. Connecting blocks both ends, so all
        ranks go through the channels in the same order.
        """
        lanes = list(dict.fromkeys(_lane(channel) for channel in self.channels))
        groups = {lane: dist.new_group() for lane in lanes}
        nothing = torch.zeros(1, device=self.device)
        me = dist.get_rank()
        pairs = dict.fromkeys((_lane(c), c.source, c.target) for c in self.channels)
        for lane, source, target in pairs:
            if self.peers[source] == me:
                dist.send(nothing, self.peers[target], group=groups[lane])
            elif self.peers[target] == me:
                dist.recv(nothing, self.peers[source], group=groups[lane])
        return groups


@dataclass(frozen=True, slots=True)
class _Posted:
    channel: Channel
    peer: int
    buffer: Tensor
    spec: TensorSpec
    work: dist.Work | None
    device: torch.device

    def wait(self) -> Tensor:
        if self.work is not None:
            with _blaming(self.channel, self.channel.source, self.peer):
                self.work.wait()
        return self.buffer.view(self.spec.dtype).to(self.device)


@dataclass(frozen=True, slots=True)
class _Reordered:
    """Gives a message the shape and strides that it had at its sender."""

    transport: DistributedTransport
    channel: Channel
    posted: _Posted

    def wait(self) -> Tensor:
        order = self.transport.order(self.channel)
        shape = self.posted.spec.shape
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return self.posted.wait().view([shape[d] for d in order]).permute(inverse)


@dataclass(slots=True)
class _AllReduce:
    """Sums over replicas; small tensors travel together, large ones without a copy."""

    tensors: Sequence[Tensor]
    group: dist.ProcessGroup | None
    pending: list[tuple[dist.Work, Tensor, list[Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.group is None:
            return
        small: dict[torch.dtype, list[Tensor]] = {}
        for tensor in self.tensors:
            if tensor.nbytes >= 1 << 20 and tensor.is_contiguous():
                self._start(tensor, [])
            else:
                small.setdefault(tensor.dtype, []).append(tensor)
        for together in small.values():
            self._start(torch.cat([tensor.reshape(-1) for tensor in together]), together)

    def _start(self, flat: Tensor, parts: list[Tensor]) -> None:
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None
        self.pending.append((work, flat, parts))

    def wait(self) -> None:
        for work, flat, parts in self.pending:
            try:
                work.wait()
            except RuntimeError as error:
                raise PeerError(f"the sum over replicas failed: {_reason(error)}") from None
            if parts:
                for part, total in zip(
                    parts, torch.split(flat, [p.numel() for p in parts]), strict=True
                ):
                    part.copy_(total.view_as(part))
        self.pending.clear()


@contextmanager
def _blaming(channel: Channel, stage: int, peer: int) -> Iterator[None]:
    """Turns the transport's own errors into one that names the message and the peer."""
    try:
        yield
    except RuntimeError as error:
        fact = f"{channel}: no contact with stage {stage} (rank {peer})"
        raise PeerError(f"{fact}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """What gloo or NCCL says, without the place in their sources and the advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^]]*\] *", "", line).partition(". This is typically")[0]


def _lane(channel: Channel) -> tuple[Flow, bool]:
    """Channels of one lane go in one direction and are used in the same order at both ends."""
    return channel.flow, channel.source < channel.target


def _dense(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor with its dimensions in memory order, contiguous; and that order."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    packed = tensor.permute(order)
    if packed.is_contiguous():
        return packed, order
    return tensor.contiguous(), list(range(tensor.dim()))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
