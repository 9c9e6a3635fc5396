"""The last look at emitted text: valid Python, and nothing in it but what emission writes."""

import ast
from collections.abc import Collection

_ALLOWED = (
    *(ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg, ast.keyword, ast.alias),
    *(ast.Import, ast.ImportFrom, ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Pass),
    *(ast.For, ast.With, ast.withitem, ast.Call, ast.Attribute, ast.Name, ast.Constant),
    *(ast.Tuple, ast.List, ast.Dict, ast.Subscript, ast.Slice, ast.BinOp, ast.UnaryOp),
    *(ast.Compare, ast.Starred, ast.GeneratorExp, ast.DictComp, ast.comprehension),
    *(ast.operator, ast.unaryop, ast.cmpop, ast.expr_context),
)
_IMPORTS = {
    "from collections import OrderedDict",
    "import torch",
    "import torch.nn.functional as F",
    "from torch import Tensor, nn",
    "from torch import Tensor",
    "from torch import nn",
    "from p2bw import opaque",
}
_BUILTINS = {"super", "next", "range", "str", "tuple", "int", "float", "None"}


def check(text: str, libraries: Collection[str] = ()) -> ast.Module:
    """Parse emitted text; what emission never writes is a bug, and must not reach a file.

    `libraries` are the modules that it may import for their operators.
    """
    tree = ast.parse(text)
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert "Stage" in classes
    known = {"torch", "F", "nn", "Tensor", "OrderedDict", "opaque", "__file__"}
    known |= classes | _BUILTINS
    for statement in tree.body:
        if not isinstance(statement, ast.ClassDef):
            _check(statement, known, [f"import {library}" for library in libraries])
            continue
        for part in statement.body:
            bound = {node.arg for node in ast.walk(part) if isinstance(node, ast.arg)}
            _check(part, known | bound)
    return tree


def _check(top: ast.AST, known: set[str], imports: Collection[str] = ()) -> None:
    """Only known kinds of nodes, imports, attributes and names."""
    loaded: set[str] = set()
    stored: set[str] = set()
    for node in ast.walk(top):
        assert isinstance(node, _ALLOWED), ast.dump(node)
        if isinstance(node, ast.Name):
            (stored if isinstance(node.ctx, ast.Store) else loaded).add(node.id)
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("__") or node.attr == "__init__", node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            line = ast.unparse(node)
            assert line in _IMPORTS or line in imports, line
    assert loaded <= known | stored, loaded - known - stored
