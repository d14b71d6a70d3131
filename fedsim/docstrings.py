"""The docstring under each field of a dataclass, which only the source holds."""

import ast
import inspect
from types import ModuleType


def field_docstrings(module: ModuleType) -> dict[str, dict[str, str]]:
    """Returns {class: {field: docstring, in one line}} of the classes of a module; a field without one has an empty text."""
    classes = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
    return {node.name: _of_class(node) for node in classes}


def _of_class(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[field.target.id] = " ".join(str(text).split())
    return found
