"""Weight updates between the runs that are measured, as a rank makes them."""

from torch import nn

from p2bw.modelfile.load import ModelFile
from p2bw.runtime.weights import Updater, Weights

VERSIONS = 2  # of the weights, as under 2bw


class Training:
    """The user's model with two versions of its weights, and the runtime's updates of them.

    An update leaves the next microbatches cold caches and another version's weights: without, they
    are measured as too fast. The learning rate is zero, so that nothing runs away.
    """

    def __init__(self, file: ModelFile, model: nn.Module) -> None:
        self.weights = Weights(model, VERSIONS)
        self.updater = Updater(
            self.weights, self.weights.names, file.optimizer, lambda optimizer: None
        )
        for group in self.updater.optimizer.param_groups if self.updater.optimizer else ():
            if group.get("lr") is not None:
                group["lr"] *= 0  # whatever kind of number it is
        self.batch = 0

    def update(self) -> None:
        """Make the next version with the gradients that there are, and let the model use it."""
        gradients = self.weights.take_gradients((self.batch,))
        self.updater.update(self.batch, gradients)
        self.batch += 1
        self.weights.use(self.batch)
