from dataclasses import replace

import pytest
import torch
from annotated import annotated
from corpus import CORPUS
from flops import count
from torch.nn.attention import SDPBackend, sdpa_kernel

from p2bw.compiler.devices import find_device
from p2bw.compiler.program import MissingFactError
from p2bw.passes import annotate_time

every_architecture = pytest.mark.parametrize("architecture", CORPUS, ids=lambda a: a.name)
ARCHITECTURES = {architecture.name: architecture for architecture in CORPUS}


def total(program, fact):
    return sum(program.fact(node, fact) for node in program.compute_nodes)


@every_architecture
def test_flops_are_those_of_the_whole_model(architecture, monkeypatch):
    file, program = annotated(architecture)
    # torch's counter knows neither CPU attention nor oneDNN's recurrent layers.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with sdpa_kernel(SDPBackend.MATH):
        forward, backward = count(file, "cpu", program.batch_size)
    assert forward > 0
    assert total(program, "flops_forward") == forward
    assert total(program, "flops_backward") == backward


@pytest.mark.parametrize("name", ["gpt", "resnet", "unet"])
def test_flops_are_those_of_the_whole_model_on_meta(name):
    file, program = annotated(ARCHITECTURES[name])
    forward, backward = count(file, "meta", program.batch_size)
    assert total(program, "flops_forward") == forward
    assert total(program, "flops_backward") == backward


def test_traffic_of_single_operators():
    _, program = annotated(ARCHITECTURES["gpt"])
    for node in program.compute_nodes:
        forward = program.fact(node, "traffic_forward")
        backward = program.fact(node, "traffic_backward")
        name = str(node.target)
        size = sum(kind.bytes for kind in program.facts[node.name].out)
        if name in ("aten.view.default", "aten.transpose.int", "aten.flatten.using_ints") or (
            "getitem" in name
        ):
            assert (forward, backward) == (0, 0), name
        elif name == "aten.chunk.default":
            assert (forward, backward) == (0, 2 * size), name  # the pieces' gradients, put together
        elif name == "aten.add.Tensor" and size == program.facts[node.args[1].name].out[0].bytes:
            assert (forward, backward) == (3 * size, 3 * size), name
        elif name == "aten.embedding.default":
            table, index = (program.facts[argument.name].out[0].bytes for argument in node.args[:2])
            assert forward == 2 * size + index
            assert backward == size + index + table
        else:
            assert forward >= size, name


def test_times_follow_the_device():
    _, program = annotated(ARCHITECTURES["gpt"])
    device = find_device("A100-80")
    flops = {name: 2 * rate for name, rate in device.flops.items()}
    twice = replace(device, flops=flops, bandwidth=2 * device.bandwidth, op_overhead_s=0.0)
    free = replace(device, op_overhead_s=0.0)
    slow, fast = annotate_time(program, device=free), annotate_time(program, device=twice)
    for fact in ("forward_s", "backward_s"):
        assert total(slow, fact) == pytest.approx(2 * total(fast, fact))
        assert total(program, fact) > total(slow, fact) > 0
    for node in program.compute_nodes:
        busy = program.fact(node, "flops_forward") + program.fact(node, "traffic_forward") > 0
        assert (program.fact(node, "forward_s") >= device.op_overhead_s) == busy


def test_arithmetic_in_bfloat16_takes_the_rate_of_bfloat16(tmp_path):
    from p2bw.compiler.trace import trace
    from p2bw.modelfile.load import load_model_file
    from p2bw.passes import annotate_autograd, annotate_cost

    path = tmp_path / "net.py"
    path.write_text("""\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, cast):
        super().__init__()
        self.cast = cast
        self.up = nn.Linear(512, 512)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.cast):
            x = self.up(x)
        return x.float().mean()


def model(cast=False):
    return Net(cast)


def inputs(batch_size):
    return (torch.randn(4096, 512),)
""")
    device = replace(find_device("A100-80"), op_overhead_s=0.0, bandwidth=1e18)
    seconds = []
    for cast in (False, True):
        file = load_model_file(path, settings={"cast": cast})
        program = annotate_cost(annotate_autograd(trace(file, 1)))
        seconds.append(total(annotate_time(program, device=device), "forward_s"))
    assert seconds[0] / seconds[1] == pytest.approx(
        device.sustained_flops(torch.bfloat16) / device.sustained_flops(torch.float32), rel=0.05
    )


def test_times_need_costs():
    _, program = annotated(ARCHITECTURES["mlp"])
    unknown = replace(
        program, facts={n: replace(f, flops_forward=None) for n, f in program.facts.items()}
    )
    with pytest.raises(MissingFactError, match="run annotate_cost first"):
        annotate_time(unknown, device=find_device("A100-80"))
