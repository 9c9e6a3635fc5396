"""The last look at emitted text: valid Python, and nothing in it but what emission writes."""

import ast

_ALLOWED = (
    *(ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg, ast.keyword, ast.alias),
    *(ast.Import, ast.ImportFrom, ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Pass),
    *(ast.For, ast.With, ast.withitem, ast.Call, ast.Attribute, ast.Name, ast.Constant),
    *(ast.Tuple, ast.List, ast.Dict, ast.Subscript, ast.Slice, ast.BinOp, ast.UnaryOp),
    *(ast.Compare, ast.GeneratorExp, ast.DictComp, ast.comprehension),
    *(ast.operator, ast.unaryop, ast.cmpop, ast.expr_context),
)
_IMPORTS = {
    "from collections import OrderedDict",
    "import torch",
    "import torch.nn.functional as F",
    "from torch import Tensor, nn",
    "from torch import Tensor",
    "from torch import nn",
}
_BUILTINS = {"super", "range", "str", "tuple", "int", "float", "None"}


def check(text: str) -> ast.Module:
    """Parse emitted text; what emission never writes is a bug, and must not reach a file."""
    tree = ast.parse(text)
    imported = {"torch", "F", "nn", "Tensor", "OrderedDict"}
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert "Stage" in classes
    for node in ast.walk(tree):
        assert isinstance(node, _ALLOWED), ast.dump(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert ast.unparse(node) in _IMPORTS, ast.unparse(node)
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("__") or node.attr == "__init__", node.attr
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            known = imported | classes | _BUILTINS
            known |= {arg.arg for arg in function.args.args}
            for name in ast.walk(function):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    known.add(name.id)
            for name in ast.walk(function):
                assert not isinstance(name, ast.Name) or name.id in known, name.id
    return tree
