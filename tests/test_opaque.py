"""Modules that cannot be traced: one opaque call each, in every part of the compiler."""

import pytest
import torch
from corpus import ROOT
from reference import Reference

from p2bw.compiler.driver import compile_model
from p2bw.compiler.opaque import OPAQUE
from p2bw.compiler.opaque_costs import parse_declared
from p2bw.compiler.plan import read_plan
from p2bw.compiler.problem import problem_of
from p2bw.compiler.trace import trace
from p2bw.compiler.verify import verify
from p2bw.contract.errors import ModelError, UsageError
from p2bw.contract.job import Job
from p2bw.contract.stages import find_model_file, load_stage
from p2bw.modelfile.load import load_model_file
from p2bw.passes.annotate_autograd import annotate_autograd
from p2bw.passes.annotate_cost import annotate_cost
from p2bw.passes.group_blocks import group_blocks
from p2bw.runtime.local import train_in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn


def inputs(batch_size):
    return (torch.randn(batch_size, 8),)


def targets(batch_size):
    return (torch.randn(batch_size, 8),)


def loss(outputs, wanted):
    return F.mse_loss(outputs, wanted)


def model():
    return Net()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.part = Part()
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.drop(x + self.part(x)))


"""


@pytest.fixture
def file_of(tmp_path):
    def write(text, head=HEAD):
        path = tmp_path / "net.py"
        path.write_text(head + text)
        return load_model_file(path)

    return write


def compiled(path, out, **options):
    """Two stages for two devices."""
    arguments = {"device": "cpu", "gpus": 2, "depth": 2, "microbatch": 2, **options}
    return compile_model(path, out=out, **arguments)


def verified(text, tmp_path, head=HEAD, tied=False):
    """The plan of a model that is compiled in two stages and computes what eager does, bit by bit
    (but for sums over `tied` stages), and the text of the stages."""
    path = tmp_path / "net.py"
    path.write_text(head + text)
    plan = compiled(path, tmp_path / "out").plan
    found = verify(tmp_path / "out", model=path)
    assert found.ok, found.problems
    assert found.loss_bitwise
    assert tied or found.compared == found.bitwise > 0
    return plan, [p.read_text() for p in sorted((tmp_path / "out" / "stages").iterdir())]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    out = tmp_path_factory.mktemp("moe") / "moe"
    compiled(ROOT / "examples" / "moe.py", out, factory="tiny")
    return out


def test_a_mixture_of_experts_is_compiled_around_its_routing(mixture):
    plan = read_plan(mixture)
    assert [o.module for o in plan.opaque] == [f"h.{i}.moe" for i in range(4)]
    assert {o.type for o in plan.opaque} == {"moe.MoE"}
    assert plan.opaque[0].reason.startswith("moe.py:")
    assert "decides by the values" in plan.opaque[0].reason
    assert sum(len(o.stages) for o in plan.opaque) == 4
    found = verify(mixture)
    assert found.ok
    assert found.compared == found.bitwise == 72
    text = (mixture / "stages" / "stage_0.py").read_text()
    assert 'Block(moe_path="h.0.moe")' in text
    assert "self.moe = opaque(__file__, moe_path)" in text
    assert "as it is, not traced, its costs counted in a run: moe.py:" in text


def test_flops_are_those_of_the_tokens_that_are_routed():
    file = load_model_file(ROOT / "examples" / "moe.py", factory="tiny")
    program = annotate_cost(annotate_autograd(trace(file, 2)))
    tokens, width, hidden, experts = 2 * 16, 32, 64, 4
    forward = 2 * tokens * width * experts + 2 * tokens * 2 * 3 * width * hidden
    for node in program.opaque:
        assert program.fact(node, "flops_forward") == forward
        assert program.fact(node, "flops_backward") == 2 * forward


def test_attention_inside_is_counted(file_of):
    program = trace(
        file_of("""
class Part(nn.Module):
    def forward(self, x):
        q = x.view(1, 1, -1, 8)
        y = F.scaled_dot_product_attention(q, q, q).view_as(x)
        return y if y.sum() > 0 else -y
"""),
        6,
    )
    program = annotate_cost(annotate_autograd(program))
    (node,) = program.opaque
    product = 2 * 6 * 6 * 8
    assert program.fact(node, "flops_forward") == 2 * product
    assert program.fact(node, "flops_backward") == 5 * product  # the scores once more


def test_costs_can_be_declared(tmp_path):
    path = ROOT / "examples" / "moe.py"
    costs = parse_declared(["h.*.moe:forward=3e9", "h.3.moe:forward=5e9,backward=7e9,saved=2.5e6"])
    made = compiled(path, tmp_path / "moe", factory="tiny", opaque_costs=costs)
    counted = compiled(path, tmp_path / "counted", factory="tiny").plan
    *others, last = made.plan.opaque
    assert [o.flops_forward for o in others] == [6_000_000_000] * 3  # of two samples
    assert [o.flops_backward for o in others] == [o.flops_backward for o in counted.opaque[:3]]
    assert (last.flops_forward, last.flops_backward) == (10_000_000_000, 14_000_000_000)
    assert {o.costs for o in made.plan.opaque} == {"declared"}
    assert {o.costs for o in counted.opaque} == {"counted"}
    seconds = sum(stage.compute_s.total for stage in made.plan.stages)
    assert seconds > 50 * sum(stage.compute_s.total for stage in counted.stages)
    stash = {b.name: b.stash_bytes for b in problem_of(tmp_path / "moe").blocks}
    assert stash["h.3.moe"] - stash["h.2.moe"] > 4_000_000
    assert "its costs declared: moe.py:" in (tmp_path / "moe/stages/stage_0.py").read_text()
    assert verify(tmp_path / "moe").ok


@pytest.mark.parametrize(
    "text",
    ["moe", "moe:", "moe:forward", "moe:forward=-1", "moe:forward=nan", "moe:time=1", ":saved=1",
     "moe:saved=1,saved=2", "moe:forward=1e999"],
)  # fmt: skip
def test_a_declaration_that_is_none_is_a_mistake_of_usage(text):
    with pytest.raises(UsageError, match="write MODULE:forward=FLOPS"):
        parse_declared([text])


def test_a_declaration_for_no_opaque_module_is_a_mistake_of_usage(tmp_path):
    costs = parse_declared(["h.*.attn:forward=1"])
    with pytest.raises(UsageError, match=r"kept opaque \(those: h.0.moe, h.1.moe"):
        compiled(ROOT / "examples" / "moe.py", tmp_path / "o", factory="tiny", opaque_costs=costs)


def test_equal_modules_are_run_once(monkeypatch):
    import p2bw.compiler.opaque as module

    runs = []
    observe = module.observe
    monkeypatch.setattr(module, "observe", lambda *a: runs.append(1) or observe(*a))
    program = trace(load_model_file(ROOT / "examples" / "moe.py", factory="tiny"), 2)
    assert len(program.opaque) == 4
    assert len(runs) == 1


def by_hand(artifact, steps, *, width=1, microbatches):
    """Losses and weights of the user's own model, trained by the equation of 2BW; and how many
    batches left a weight without a gradient."""
    plan = read_plan(artifact)
    file = find_model_file(artifact)
    torch.manual_seed(0)
    model = file.model()
    idle = []

    class Watched(Reference):
        def update(self):
            idle.append(sum(p.grad is None for p in self.model.parameters()))
            super().update()

    loop = Watched(
        model=model,
        step=lambda model, item, enter: file.call(model, *item),
        items=file.data(plan.microbatch, 0),
        optimizer=file.optimizer(model.named_parameters()),
        scheduler=None,
        depth=plan.depth,
        width=width,
        microbatches=microbatches,
    )
    return loop.train(steps), model.state_dict(), idle


def test_a_mixture_of_experts_trains_as_the_whole_model_does(mixture):
    trained = train_in_threads(Job(artifact=mixture, steps=20, microbatches=2))
    losses, state, _ = by_hand(mixture, 20, microbatches=2)
    assert trained.losses == losses
    for stage in trained.states:
        for name, tensor in stage.items():
            assert torch.equal(tensor, state[name]), name


LONELY = (
    HEAD.replace("nn.Dropout(0.5)", "nn.Identity()")
    + """
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(8)) for _ in range(16))

    def forward(self, x):
        return x * self.weights[int(x.sum().item() * 1000) % 16]
"""
)


def test_weights_that_some_replicas_do_not_use_are_updated_as_in_one_process(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(LONELY)
    out = tmp_path / "out"
    compiled(path, out, gpus=4, width=2, microbatches=2)
    losses, state, idle = by_hand(out, 6, width=2, microbatches=2)
    assert min(idle) > 0  # no batch meets all weights
    trained = train_in_threads(Job(artifact=out, steps=6, microbatches=2))
    assert trained.losses == losses
    for stage in trained.states:
        for name, tensor in stage.items():
            assert torch.equal(tensor, state[name]), name


def test_a_custom_function_keeps_its_backward(tmp_path):
    plan, texts = verified(
        """
class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return Triple.apply(self.fc(x))
""",
        tmp_path,
    )
    (opaque,) = plan.opaque
    assert opaque.module == "part"
    assert "Triple is a torch.autograd.Function" in opaque.reason
    assert sum('opaque(__file__, "part")' in text for text in texts) == 1


CALLED = """
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        RESULT


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, how=None, *, scale=1.0, more=()):
        if x.sum() > 0:
            x = -x
        y = self.fc(x) * scale
        return RETURNED
"""


@pytest.mark.parametrize(
    ("returned", "result", "line"),
    [
        ("y", "return self.inner(x)", "self.inner(x)"),
        ("y, None, y.exp()", "a, _, b = self.inner(x); return a + b", ", _, "),
        ('{"y": y, "n": 3}', 'return self.inner(x)["y"]', '["y"]'),
        ("[[y, y.sin()], y.exp()]", "(a, b), c = self.inner(x); return a + b * c", "[0][1]"),
        (
            "y + how['a'] * more[0]",
            "return self.inner(x, {'a': x, 'b': 'c'}, scale=2.0, more=[x.exp()])",
            "scale=2.0, more=[",
        ),
        ("x.detach(), y", "return sum(self.inner(x))", "self.inner(x)"),
    ],
)
def test_arguments_and_results_of_any_form(tmp_path, returned, result, line):
    text = CALLED.replace("RETURNED", returned).replace("RESULT", result)
    plan, texts = verified(text, tmp_path)
    assert [o.module for o in plan.opaque] == ["part.inner"]
    assert any(line in text for text in texts), texts


def test_a_module_of_torchs_own(tmp_path):
    plan, texts = verified(
        """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 16))
        self.out = nn.AdaptiveLogSoftmaxWithLoss(16, 20, [4, 10])

    def forward(self, x, labels):
        return self.out(self.first(x), labels).loss


def model():
    return Net()


def inputs(batch_size):
    return torch.randn(batch_size, 8), torch.randint(20, (batch_size,))
""",
        tmp_path,
        "",
    )
    assert [o.module for o in plan.opaque] == ["out"]
    assert "return self.out(first, labels)[1]" in texts[-1]


def test_state_of_an_opaque_module(tmp_path):
    """Buffers that it counts in, frozen weights, a tie with the outside, dropout as data has it."""
    head = HEAD.replace(
        "self.last = nn.Linear(8, 8)",
        "self.last = nn.Linear(8, 8)\n        self.last.weight = self.part.fc.weight",
    )
    plan, _ = verified(
        """
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)
        self.table = torch.arange(8.0)

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        y = self.fc(x) + self.frozen(x) * self.scale + self.table
        for _ in range(1 + int(x.abs().sum()) % 5):
            y = F.dropout(y, 0.1)
        return y
""",
        tmp_path,
        head,
    )
    assert [o.module for o in plan.opaque] == ["part"]
    file = find_model_file(tmp_path / "out", tmp_path / "net.py")
    names = {
        name
        for k in range(plan.depth)
        for name, _ in load_stage(tmp_path / "out", k, file).named_parameters()
    }
    assert {"part.fc.weight", "part.frozen.bias"} <= names
    (tied,) = plan.tied
    assert set(tied.names) == {"part.fc.weight", "last.weight"}


def test_an_opaque_module_in_place_and_in_a_sequence(tmp_path):
    """It changes its input in place; its own children and neighbours in an nn.Sequential."""
    plan, _ = verified(
        """
class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        if x.mean() > 0:
            x.mul_(2)
        else:
            x.add_(1)
        return self.fc(x)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = nn.Sequential(nn.Linear(8, 8), Step(), nn.ReLU(), nn.Linear(8, 8), Step())

    def forward(self, x):
        y = x.exp()
        z = self.steps(y)
        return y + z
""",
        tmp_path,
    )
    assert [o.module for o in plan.opaque] == ["part.steps.1", "part.steps.4"]


def test_a_result_whose_shape_depends_on_data_makes_the_module_around_opaque(tmp_path):
    plan, _ = verified(
        """
class Chosen(nn.Module):
    def forward(self, x):
        return x[x.sum(1) > 0]


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.chosen = Chosen()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + self.chosen(x).sum()
""",
        tmp_path,
    )
    assert [o.module for o in plan.opaque] == ["part"]


ESCAPES = """
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.known = [self.fc.weight]
        self.config = object()

    def forward(self, x):
        BODY
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # The user's own mistake stays the message that it is without opaque modules.
        (
            "return self.fc(x) + torch.ones(7)",
            r"net.py:\d+: the training step of model.*\n.*\nthe step is.*$",
        ),
        # Known only to the module's caller, who is the model itself.
        ("return Chosen()(x)", r"net.py:\d+: the "),
        ("return self.fc(x) * (x.sum() > 0).item()", r"keeps a parameter or buffer in known"),
        ("return self.fc(x)[: int(x.sum() > 0) + 1]", "net.py"),
    ],
)
def test_what_cannot_be_opaque_is_one_clear_message(file_of, body, message):
    text = ESCAPES.replace("BODY", body)
    if "known" not in message:
        text = text.replace("self.known = [self.fc.weight]", "")
    text += "\n\nclass Chosen(nn.Module):\n    def forward(self, x):\n        return x[x > 0]\n"
    with pytest.raises(ModelError, match=message):
        trace(file_of(text), 2)


def test_only_the_opaque_module_gets_memory(file_of):
    program = trace(
        file_of(
            """
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x
""",
            HEAD.replace("nn.Tanh()", "nn.Linear(8, 1 << 34), nn.Linear(1 << 34, 8)"),  # 1 TiB
        ),
        2,
    )
    assert [call.path for call in program.opaque.values()] == ["part"]


def test_it_is_one_block_and_artifacts_are_the_same_each_time(mixture, tmp_path):
    file = load_model_file(ROOT / "examples" / "moe.py", factory="tiny")
    program = annotate_autograd(trace(file, 2))
    second = {node.name: 1.0 for node in program.compute_nodes}
    program = group_blocks(program.learn("annotate_time", forward_s=second, backward_s=second))
    opaque = [node for node in program.compute_nodes if node.target is OPAQUE]
    for node in opaque:
        (block,) = (b for b in program.blocks if node.name in b.nodes)
        assert {user.name for user in node.users} <= set(block.nodes)
    compiled(ROOT / "examples" / "moe.py", tmp_path / "again", factory="tiny")
    for path in sorted(p for p in mixture.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(mixture)).read_bytes()


def test_a_result_of_another_shape_than_compiled_stops_the_run(tmp_path):
    """No value that the compiler draws is above 100."""
    path = tmp_path / "net.py"
    path.write_text(
        HEAD
        + """
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x)[:1] if x.max() > 100 else self.fc(x)
"""
    )
    out = compiled(path, tmp_path / "out").artifact
    file = find_model_file(out, path)
    (stage,) = (s for s in (load_stage(out, k, file) for k in range(2)) if hasattr(s, "part"))
    assert stage.part(torch.ones(2, 8)).shape == (2, 8)
    with pytest.raises(ModelError, match=r"part returned float32\[1, 8\], but .*float32\[2, 8\]"):
        stage.part(torch.full((2, 8), 200.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen2Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                      "shared_expert_intermediate_size": 32}),
    ],
)  # fmt: skip
def test_the_experts_of_hugging_face_models(tmp_path, name, sizes):
    pytest.importorskip("transformers")
    head = f"""
import torch
from transformers import {name}Config, {name}ForCausalLM


def model():
    config = {name}Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **{sizes!r}
    )
    config._experts_implementation = "eager"
    return {name}ForCausalLM(config)


def inputs(batch_size):
    tokens = torch.randint(128, (batch_size, 16))
    return {{"input_ids": tokens, "labels": tokens}}
"""
    plan, texts = verified("", tmp_path, head)
    assert [o.module for o in plan.opaque] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
    assert all(".experts = opaque(__file__, " in text for text in texts)


HOSTILE = 'weight"); exit(3)  #'


def test_names_that_are_code_stay_names(tmp_path):
    """A tied parameter of an opaque module, and a key of a dictionary that it returns."""
    head = HEAD.replace(
        "self.last = nn.Linear(8, 8)",
        "self.last = nn.Linear(8, 8)\n"
        f"        self.last.weight = getattr(self.part.inner, {HOSTILE!r})",
    )
    text = f"""
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return self.inner(x, {{{HOSTILE!r}: x}})[{HOSTILE!r}]


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter({HOSTILE!r}, nn.Parameter(torch.randn(8, 8)))

    def forward(self, x, more):
        x = x @ getattr(self, {HOSTILE!r})
        return {{{HOSTILE!r}: more[{HOSTILE!r}] * (2 if x.sum() > 0 else 3)}}
"""
    plan, texts = verified(text, tmp_path, head)
    assert [o.module for o in plan.opaque] == ["part.inner"]
    assert any(repr(HOSTILE) in text for text in texts)


def test_a_module_that_is_called_often_and_under_two_names(tmp_path):
    """Its weights are on each stage that calls it, and tied there."""
    head = HEAD.replace(
        "self.drop = nn.Dropout(0.5)", "self.again = self.part\n        self.drop = nn.Identity()"
    ).replace("x = self.first(x)", "x = self.again(self.first(x)) + self.part(x)")
    plan, _ = verified(
        """
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(1 + int(x.sum()) % 3):
            x = F.dropout(x, 0.1)
        return self.fc(x)
""",
        tmp_path,
        head,
        tied=True,
    )
    (opaque,) = plan.opaque
    assert opaque.module == "part"


def test_there_is_no_onnx_of_an_opaque_module(mixture, tmp_path):
    pytest.importorskip("onnxscript")
    from p2bw.compiler.onnx.stages import export_onnx

    with pytest.raises(ModelError, match=r"^h.0.moe was not traced \(moe.py:"):
        export_onnx(mixture, out=tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_mask_that_no_other_values_can_stand_for(tmp_path):
    """What a module takes is found out: this one is content with ones."""
    plan, _ = verified(
        """
class Masked(nn.Module):
    def forward(self, x, mask):
        if (mask != 1).any():
            raise ValueError("this is no mask")
        return x * mask


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.masked = Masked()
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.masked(self.first(x), (x == x).float()))
""",
        tmp_path,
    )
    assert [o.module for o in plan.opaque] == ["masked"]
