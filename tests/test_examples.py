import inspect
import itertools
import math
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import typer
from corpus import CORPUS, ROOT, Architecture
from torch import nn

from p2bw.__main__ import app
from p2bw.modelfile.load import ModelFile, load_model_file

every_example = pytest.mark.parametrize("example", CORPUS, ids=lambda example: example.name)


def load(example: Architecture) -> ModelFile:
    return load_model_file(example.path, example.factory)


def gpt(factory: str = "tiny") -> ModelFile:
    return load_model_file(ROOT / "examples" / "gpt.py", factory)


def eager_loss(file: ModelFile, model: nn.Module, batch: int) -> torch.Tensor:
    """One training step's loss as a user would write it, with none of our code."""
    inputs = file.inputs(batch)
    outputs = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    loss = getattr(file.module, "loss", None)
    if loss is not None:
        return loss(outputs, *file.module.targets(batch))
    return outputs.loss


def factories(file: ModelFile) -> dict[str, Callable[..., nn.Module]]:
    """The public functions of a file whose result is annotated as a module."""
    return {
        name: function
        for name, function in vars(file.module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__ == file.module.__name__
        and isinstance(function.__annotations__.get("return"), type)
        and issubclass(function.__annotations__["return"], nn.Module)
        and not issubclass(function.__annotations__["return"], nn.Sequential)
    }


def test_the_corpus_holds_at_least_twelve_architectures() -> None:
    assert len(CORPUS) >= 12


@every_example
def test_a_training_step_runs_in_plain_pytorch(example: Architecture) -> None:
    torch.manual_seed(0)
    file = load(example)
    model = file.model()
    loss = eager_loss(file, model, example.batch)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@every_example
def test_the_tiny_size_is_tiny(example: Architecture) -> None:
    assert sum(p.numel() for p in load(example).model().parameters()) < 300_000


@every_example
def test_the_default_size_is_worth_a_pipeline(example: Architecture) -> None:
    with torch.device("meta"):
        model = load_model_file(example.path).model()
    assert sum(p.numel() for p in model.parameters()) > 20e6


@every_example
def test_every_argument_of_a_factory_can_be_left_out_or_set(example: Architecture) -> None:
    found = factories(load(example))
    assert {"model", "tiny"} <= found.keys()
    for factory in found.values():
        parameters = inspect.signature(factory).parameters.values()
        assert all(p.default is not inspect.Parameter.empty for p in parameters)


@every_example
def test_the_docstring_s_commands_exist(example: Architecture) -> None:
    file = load(example)
    commands = re.findall(r"^ *p2bw (.*)$", file.module.__doc__ or "", re.MULTILINE)
    assert commands
    for command in commands:
        name, *arguments = shlex.split(command, comments=True)
        # Parses the options: an unknown one raises.
        context = typer.main.get_command(app).commands[name].make_context(name, arguments)
        if name == "compile":
            path, _, factory = context.params["model"].partition(":")
            assert ROOT / path == example.path
            assert hasattr(file.module, factory or "model")


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        ("model", 2.156e9),  # PipeDream-2BW's GPT with a vocabulary of 50,304
        ("small", 3.26e6),
        ("gpt2_medium", 354.9e6),
        ("gpt2_xl", 1.5577e9),
        ("gpt3_175b", 174.6e9),
        ("gpt_1t", 1008.2e9),
        ("large_vocabulary", 6.978e9),
    ],
)
def test_the_gpts_have_the_sizes_that_they_are_known_by(factory: str, parameters: float) -> None:
    with torch.device("meta"):
        model = gpt(factory).model()
    assert math.isclose(sum(p.numel() for p in model.parameters()), parameters, rel_tol=1e-3)


def test_the_gpt_reads_real_text_the_same_for_the_same_seed() -> None:
    file = gpt()
    file.model()
    data: Callable[[int, int], Any] = file.module.data
    first, again, other = (list(itertools.islice(data(3, seed), 2)) for seed in (0, 0, 1))
    long = itertools.islice(data(32, 0), 8)
    for ((tokens,), (labels,)), ((tokens_again,), (labels_again,)) in zip(
        first, again, strict=True
    ):
        assert torch.equal(tokens, tokens_again)
        assert torch.equal(labels, labels_again)
        assert tokens.shape == labels.shape == (3, 64)
        assert tokens.is_contiguous()
        assert labels.is_contiguous()
        assert torch.equal(tokens[:, 1:], labels[:, :-1])  # each label is the next token
    assert b"import " in bytes(torch.cat([tokens.flatten() for (tokens,), _ in long]).tolist())
    assert not torch.equal(first[0][0][0], other[0][0][0])
    assert not torch.equal(first[0][0][0], first[1][0][0])


def test_the_gpt_learns_the_text() -> None:
    torch.manual_seed(0)
    file = gpt()
    model = file.model()
    optimizer = file.module.optimizer(list(model.parameters()))
    scheduler = file.module.scheduler(optimizer)
    losses = []
    for inputs, targets in itertools.islice(file.module.data(8, 0), 100):
        loss = file.module.loss(model(*inputs), *targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0


def test_the_gpt_s_optimizer_decays_matrices_only() -> None:
    model = gpt().model()
    optimizer = gpt().module.optimizer(list(model.parameters()))
    for group in optimizer.param_groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )


def test_the_examples_do_not_know_p2bw() -> None:
    for example in CORPUS:
        assert not re.search(r"^\s*(import|from) p2bw", example.path.read_text(), re.MULTILINE)
