"""Start-up: the names, the order and the first values of a model's parameters."""

import pytest
from corpus import CORPUS, Architecture

from p2bw.modelfile.initial import parameter_order
from p2bw.modelfile.load import load_model_file

every_example = pytest.mark.parametrize("example", CORPUS, ids=lambda a: a.name)


@every_example
def test_the_order_of_the_parameters_is_that_of_the_real_model(example: Architecture) -> None:
    file = load_model_file(example.path, example.factory)
    names = [name for name, p in file.model().named_parameters() if p.requires_grad]
    assert list(parameter_order(file)) == names
