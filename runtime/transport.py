"""Messages between ranks: one small interface, and its implementation over torch.distributed."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from p2bw.contract.errors import PeerError
from p2bw.contract.plan import TensorSpec
from p2bw.contract.schedule import Channel, Flow
from p2bw.runtime.neighbours import Neighbour, find_neighbours

# What was begun: called, it waits for the end of that.
Arrival = Callable[[], Tensor]  # a receive that was posted; in the memory layout of the sender's
Reduction = Callable[[], None]  # a sum over replicas: afterwards the tensors hold it


class Transport(Protocol):
    """What a worker needs of the world outside: the channels of its stage and its replicas."""

    def send(self, channel: Channel, tensor: Tensor) -> None:
        """Start to send a tensor without a gradient; it may be dropped but not written to."""

    def receive(self, channel: Channel) -> Arrival:
        """Post the receive of the channel's next message."""

    def reduce(self, tensors: Sequence[Tensor]) -> Reduction:
        """Start to replace the tensors by their sums over the replicas, the same bits on each."""

    def finish(self) -> None:
        """Wait until everything sent has arrived."""


class DistributedTransport:
    """Gloo on CPUs, NCCL on GPUs; a GPU without NCCL goes through host memory.

    Ranks on one machine without NCCL exchange messages through shared memory instead, which is
    several times cheaper (`Neighbour`). What follows is about the others.

    Every message is the bytes of one tensor, in the order in which they lie in memory. A channel's
    first message tells how the sender's dimensions are ordered there, if it has several, and those
    after it are packed alike. Without it a transposed tensor would arrive contiguous, and kernels
    that look at strides would give other bits than the unsplit model.

    Sends are waited for by the next send on the same channel alone, when the predecessor has long
    arrived: receives are posted as far ahead as the schedule's check demands. (Gloo's sends cannot
    be polled: they are not `is_completed` before a wait. That one takes some microseconds.)
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
        self.orders: dict[Channel, list[int]] = {}  # of dimensions in memory, both ways
        self.headers: dict[Channel, tuple[Tensor, dist.Work]] = {}  # that will tell the order
        self.sending: dict[Channel, list[tuple[dist.Work, Tensor]]] = {}
        self.near = {} if self.direct else self._find_neighbours()
        self.arrivals: dict[Channel, Arrival] = {}  # of messages from a neighbour
        for channel, spec in specs.items():
            if peers[channel.source] in self.near:
                self.arrivals[channel] = partial(self._from_neighbour, channel, spec)
        self.groups = self._connect() if self.direct else {}
        made = [dist.new_group(list(ranks)) for ranks in replicas] if len(replicas[0]) > 1 else []
        self.replicas = made[stage] if made else None

    def send(self, channel: Channel, tensor: Tensor) -> None:
        peer, order = self.peers[channel.target], self.orders.get(channel)
        if neighbour := self.near.get(peer):
            order = self.orders[channel] = order or _order(tensor)
            self._with(channel, channel.target, neighbour.send, self.tags[channel], tensor, order)
            return
        self._wait_for_sends(channel)
        if order is None:
            order = self.orders[channel] = _order(tensor)
            if len(order) > 1:
                self._send(channel, torch.tensor(order, device=self.device), header=1)
        self._send(channel, tensor.permute(order).contiguous(), header=0)

    def receive(self, channel: Channel) -> Arrival:
        if arrival := self.arrivals.get(channel):
            return arrival
        spec = self.specs[channel]
        if channel not in self.headers and len(spec.shape) > 1:
            header = self._buffer(8 * len(spec.shape))
            work = self._start(dist.irecv, header, channel, channel.source, header=1)
            self.headers[channel] = header, work
        data = self._buffer(math.prod(spec.shape) * spec.dtype.itemsize)
        if not data.numel():
            return partial(self._unpack, channel, data, None)
        work = self._start(dist.irecv, data, channel, channel.source, header=0)
        return partial(self._unpack, channel, data, work)

    def _from_neighbour(self, channel: Channel, spec: TensorSpec) -> Tensor:
        receive = self.near[self.peers[channel.source]].receive
        message = (self.tags[channel], spec.dtype, spec.shape)
        tensor: Tensor = self._with(channel, channel.source, receive, *message)
        return tensor if tensor.device == self.device else tensor.to(self.device)

    def _unpack(self, channel: Channel, data: Tensor, work: dist.Work | None) -> Tensor:
        """Give a message the type, shape and strides that it had at its sender."""
        if work is not None:
            self._with(channel, channel.source, work.wait)
        spec, order = self.specs[channel], self.order(channel)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        tensor = data.to(self.device).view(spec.dtype)
        return tensor.view([spec.shape[d] for d in order]).permute(inverse)

    def order(self, channel: Channel) -> list[int]:
        """The order in memory of the dimensions of the tensors that a channel brings."""
        if channel not in self.orders:
            self.orders[channel] = [*range(len(self.specs[channel].shape))]
            if channel in self.headers:
                header, work = self.headers[channel]
                self._with(channel, channel.source, work.wait)
                self.orders[channel] = header.view(torch.int64).tolist()
        return self.orders[channel]

    def reduce(self, tensors: Sequence[Tensor]) -> Reduction:
        return _AllReduce(tensors, self.replicas).wait

    def finish(self) -> None:
        for channel in list(self.sending):
            self._wait_for_sends(channel)

    def _with(self, channel: Channel, stage: int, call: Callable[..., Any], *given: Any) -> Any:
        """Call the other end; what fails there becomes an error that names message and peer."""
        try:
            return call(*given)
        except (RuntimeError, OSError) as error:
            fact = (
                f"rank {self.peers[stage]} (stage {stage}) is gone (killed, or its machine failed)"
            )
            raise PeerError(f"{channel}: {fact}: {_reason(error)}") from None

    def _buffer(self, size: int) -> Tensor:
        device = self.device if self.direct else "cpu"
        return torch.empty(size, dtype=torch.uint8, device=device)

    def _send(self, channel: Channel, packed: Tensor, header: int) -> None:
        if packed.numel():
            data = packed.view(-1).view(torch.uint8)
            data = data if self.direct else data.cpu()
            work = self._start(dist.isend, data, channel, channel.target, header)
            self.sending.setdefault(channel, []).append((work, data))

    def _start(
        self, move: Callable[..., Any], data: Tensor, channel: Channel, stage: int, header: int
    ) -> dist.Work:
        """Begin to move data from or to a stage."""
        group, tag = self.groups.get(_lane(channel)), self.tags[channel] + header
        work: dist.Work = self._with(channel, stage, move, data, self.peers[stage], group, tag)
        return work

    def _wait_for_sends(self, channel: Channel) -> None:
        for work, _ in self.sending.pop(channel, ()):  # only once: the second time gloo hangs
            self._with(channel, channel.target, work.wait)

    def _find_neighbours(self) -> dict[int, Neighbour]:
        try:
            return find_neighbours(self.peers.values(), tag=2 * len(self.channels))
        except (RuntimeError, OSError) as error:
            raise PeerError(f"a rank is gone before it began: {_reason(error)}") from None

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
            totals = torch.split(flat, [p.numel() for p in parts]) if parts else ()
            for part, total in zip(parts, totals, strict=True):
                part.copy_(total.view_as(part))
        self.pending.clear()


def _reason(error: BaseException) -> str:
    """What gloo or NCCL says, without the place in their sources and the advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^]]*\] *", "", line).partition(". This is typically")[0]


def _lane(channel: Channel) -> tuple[Flow, bool]:
    """Channels of one lane go in one direction and are used in the same order at both ends."""
    return channel.flow, channel.source < channel.target


def _order(tensor: Tensor) -> list[int]:
    """The dimensions in the order in which they lie in memory, if they fill it without gaps."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    return order if tensor.permute(order).is_contiguous() else sorted(order)
