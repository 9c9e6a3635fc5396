"""Links that are shared: everything that passes a port at a time gets an equal share of it.

So do networks that queue packets fairly, and so do many rings or TCP connections over one card, as
near as they can be described without their packets. Shares, unlike turns, treat replicas that do
the same alike. A flow is as fast as its slowest port; what it leaves of others is not given on.
"""

from collections.abc import Callable

from p2bw.compiler.simulation.job import PS
from p2bw.compiler.simulation.symmetry import Route, Symmetry

Push = Callable[[int, int, int], None]  # when (ps), flow, stamp


class Links:
    """The flows under way: between pairs of ranks, by class of replicas, then each stage's sum.

    What remains of a flow is counted in 1e-12 bytes, so that a rate in bytes/s times picoseconds is
    a whole number. A flow's end is announced by `push`; it holds while its stamp is `valid`.
    """

    def __init__(self, symmetry: Symmetry, push: Push) -> None:
        self.push = push
        self.bandwidth = symmetry.bandwidth
        self.routes: list[Route] = [route for own in symmetry.routes for route in own]
        self.routes += symmetry.rings
        self.load = [0] * len(symmetry.bandwidth)  # flows through each port
        self.users: list[dict[int, None]] = [{} for _ in symmetry.bandwidth]
        self.carried = [0] * len(symmetry.bandwidth)  # bytes through each port
        self.left = [0] * len(self.routes)
        self.rate = [0] * len(self.routes)
        self.since = [0] * len(self.routes)
        self.stamp = [0] * len(self.routes)

    def begin(self, flow: int, size: int, now: int) -> None:
        ports = self.routes[flow].ports
        if not size or not ports:
            self.left[flow], self.rate[flow] = 0, 0
            self.stamp[flow] += 1
            self.push(now, flow, self.stamp[flow])
            return
        self.left[flow], self.rate[flow], self.since[flow] = size * PS, 0, now
        for port, count in ports:
            self.load[port] += count
            self.users[port][flow] = None
            self.carried[port] += count * size
        self._share(flow, now)

    def end(self, flow: int, now: int) -> int:
        """When the last byte arrives."""
        if self.rate[flow]:
            for port, count in self.routes[flow].ports:
                self.load[port] -= count
                del self.users[port][flow]
            self._share(flow, now)
        self.rate[flow] = 0
        return now + self.routes[flow].latency

    def valid(self, flow: int, stamp: int) -> bool:
        return self.stamp[flow] == stamp

    def state(self, now: int) -> object:
        """What remains of each flow that is under way."""
        return tuple(
            (flow, self.left[flow] - self.rate[flow] * (now - self.since[flow]))
            for flow in range(len(self.routes))
            if self.rate[flow]
        )

    def _share(self, changed: int, now: int) -> None:
        """Give every flow that shares a port with this one its new rate."""
        for flow in dict.fromkeys(f for q, _ in self.routes[changed].ports for f in self.users[q]):
            rate = min(self.bandwidth[q] // self.load[q] for q, _ in self.routes[flow].ports)
            if rate != self.rate[flow]:
                self.left[flow] -= self.rate[flow] * (now - self.since[flow])
                self.rate[flow], self.since[flow] = max(rate, 1), now
                self.stamp[flow] += 1
                self.push(now - -self.left[flow] // self.rate[flow], flow, self.stamp[flow])
