"""The user's model from the runtime's side: its parameters' order, and its weights at the start."""

from torch._subclasses import FakeTensorMode

from p2bw.modelfile.build import build
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.microbatch import seeded


def parameter_order(file: ModelFile) -> tuple[str, ...]:
    """Names of the trainable parameters in model.parameters() order, a tied one by its first name.

    The model is built without memory for its weights.
    """
    with seeded("model"):
        model = build(file, FakeTensorMode(allow_non_fake_inputs=True))
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
