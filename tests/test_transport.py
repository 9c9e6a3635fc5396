"""The messages between ranks, in real processes: over gloo, and between neighbours."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from p2bw.contract.errors import PeerError
from p2bw.contract.plan import TensorSpec
from p2bw.contract.schedule import Channel, Flow
from p2bw.runtime import neighbours
from p2bw.runtime.transport import DistributedTransport

CASES: dict[str, Callable[[int], None]] = {}
WAYS = ("gloo", "neighbours")  # machines that differ, or one


def in_two_ranks(
    case: Callable[[int], None], ways: Sequence[str] = WAYS
) -> Callable[[Path, str], None]:
    """A test that runs `case(rank)` in two processes; it fails if either does."""
    CASES[case.__name__] = case

    @pytest.mark.parametrize("way", ways)
    def test(tmp_path: Path, way: str) -> None:
        line = [sys.executable, __file__, case.__name__, str(tmp_path / "meeting"), way]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*line, rank], stderr=subprocess.PIPE, env=environment, text=True)
            for rank in ("0", "1")
        ]
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)

    return test


def connect(
    tensors: Sequence[Tensor], width: int = 1
) -> tuple[DistributedTransport, list[Channel]]:
    """One channel from stage 0 to 1 for each tensor, of which the shape and type are compiled in;
    with a width of 2 both ranks are replicas of the only stage."""
    rank = dist.get_rank()
    channels = [Channel(Flow.ACTIVATION, 0, 1, str(i)) for i, _ in enumerate(tensors)]
    transport = DistributedTransport(
        channels=channels,
        specs={
            c: TensorSpec(c.tensor, tuple(t.shape), t.dtype)
            for c, t in zip(channels, tensors, strict=True)
        },
        peers={0: 0, 1: 1},
        stage=0 if width == 2 else rank,
        device=torch.device("cpu"),
        replicas=[[0, 1]] if width == 2 else [[0], [1]],
    )
    return transport, channels


@in_two_ranks
def test_a_message_arrives_with_its_strides(rank: int) -> None:
    values = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    cases = [  # a tensor, and the strides that it arrives with
        (values, (12, 4, 1)),
        (values.permute(2, 0, 1), (1, 12, 4)),
        (values.bfloat16().transpose(0, 2), (1, 4, 12)),
        (values.bool(), (12, 4, 1)),
        (values[0, 0, 1], ()),
        (values[:, :0], (4, 4, 1)),  # nothing
        (values[:1, :, :1].expand(5, 3, 4), (12, 4, 1)),  # its elements share memory
        (values[..., ::2], (6, 2, 1)),  # with gaps
    ]
    tensors = [tensor for tensor, _ in cases]
    transport, channels = connect(tensors)
    for _ in range(3):
        if rank == 0:
            for channel, tensor in zip(channels, tensors, strict=True):
                transport.send(channel, tensor)
            continue
        arrivals = [transport.receive(channel) for channel in channels]
        for arrival, (tensor, strides) in zip(arrivals, cases, strict=True):
            got = arrival()
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor)
            assert got.stride() == strides
    transport.finish()


@in_two_ranks
def test_strides_that_change_on_the_way_do_not_mix_up_a_message(rank: int) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    transposed = values.t().contiguous().t()
    transport, (channel,) = connect([values])
    for number, tensor in enumerate([transposed, values, transposed]):
        if rank == 0:
            transport.send(channel, tensor + number)
        else:
            got = transport.receive(channel)()
            assert torch.equal(got, values + number)
            assert got.stride() == transposed.stride()
    transport.finish()


@partial(in_two_ranks, ways=["neighbours"])
def test_a_block_is_used_again_but_never_while_a_tensor_lies_in_it(rank: int) -> None:
    """Rank 0 sends when rank 1 says so, as the schedule sees to it in a run."""
    example = torch.zeros(64, 64)
    transport, (channel,) = connect([example])
    store = dist.distributed_c10d._get_default_store()
    sent = [torch.full_like(example, number) for number in range(14)]
    if rank == 0:
        for number, tensor in enumerate(sent):
            store.wait([f"send {number}"])
            transport.send(channel, tensor)
        return
    numbers = iter(range(len(sent)))

    def take() -> Tensor:
        store.set(f"send {next(numbers)}", "")
        return transport.receive(channel)()

    kept = take()[3:].t()  # a view of a view
    weight = nn.Parameter(torch.ones_like(example))
    (weight * 1).sum().backward()  # so that the adopted one is the only gradient below
    weight.grad = None
    gradient = take()
    seen = gradient.data_ptr()
    weight.view(64, 64).backward(gradient)
    del gradient
    assert weight.grad is not None
    assert weight.grad.data_ptr() == seen, "autograd makes a copy now: test with what it adopts"
    places = [take().data_ptr() for _ in range(8)]
    assert len(set(places)) == 1, "one block is enough in steady state"
    assert not {kept.data_ptr() - 12 * 64, seen} & set(places)
    assert torch.equal(kept, sent[0][3:].t())
    assert torch.equal(weight.grad, sent[1])
    weight.grad = None
    assert seen in {take().data_ptr(), take().data_ptr()}
    held = [take(), take()]
    assert len({tensor.data_ptr() for tensor in held}) == 2
    assert all(torch.equal(t, sent[12 + i]) for i, t in enumerate(held))


@partial(in_two_ranks, ways=["neighbours"])
def test_two_that_tell_each_other_much_do_not_wait_for_each_other(rank: int) -> None:
    """More messages both ways than a socket holds, before either receives the first."""
    transport, _ = connect([])
    neighbour = transport.near[1 - rank]
    for number in range(3000):
        neighbour.send(0, torch.tensor([number]), [0])
    for number in range(3000):
        assert neighbour.receive(0, torch.int64, [1]).item() == number


@partial(in_two_ranks, ways=["neighbours"])
def test_a_neighbour_that_is_gone_is_named(rank: int) -> None:
    transport, (channel,) = connect([torch.zeros(3)])
    if rank == 0:
        transport.near[1].connection.close()
        return
    with pytest.raises(PeerError, match=r"rank 0 \(stage 0\) is gone"):
        transport.receive(channel)()


@in_two_ranks
def test_a_send_waits_for_nobody(rank: int) -> None:
    """Rank 1 posts its receive only when rank 0 says that it has sent."""
    large = torch.arange(1 << 21, dtype=torch.float32)
    transport, (channel,) = connect([large])
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        transport.send(channel, large)
        store.set("sent", "")
    else:
        store.wait(["sent"])
        assert torch.equal(transport.receive(channel)(), large)
    transport.finish()


@in_two_ranks
def test_sums_over_replicas_are_made_in_place_and_alike(rank: int) -> None:
    def terms(of: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(of)
        large = torch.randn(600, 500, generator=generator)
        small = [torch.randn(n, 3, generator=generator) for n in (1, 5)]
        return [large, *small, small[1].double(), torch.randn(4, 6, generator=generator).t()]

    transport, _ = connect([], width=2)
    mine = terms(rank)
    places = [tensor.data_ptr() for tensor in mine]
    later = [torch.tensor([1.0 + rank])]
    reductions = [transport.reduce(mine), transport.reduce(later)]
    for reduction in reversed(reductions):
        reduction()
    assert [tensor.data_ptr() for tensor in mine] == places
    assert later[0].item() == 3
    for total, a, b in zip(mine, terms(0), terms(1), strict=True):
        assert torch.equal(total, a + b)


if __name__ == "__main__":
    case, meeting, way, rank = sys.argv[1:]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=int(rank),
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    if way == "gloo":
        neighbours._machine = lambda: bytes([int(rank)]) * neighbours._ID  # type: ignore[assignment]
    CASES[case](int(rank))
    dist.barrier()
    dist.destroy_process_group()
