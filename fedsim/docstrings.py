"""Reads the docstrings under the fields of dataclasses from the source, since Python discards them."""

import ast
import inspect
from types import ModuleType


def field_docstrings(module: ModuleType) -> dict[str, dict[str, str]]:
    """Returns {class: {field: docstring}} of a module's classes, each docstring in one line; empty for a field without one."""
    classes = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
    return {node.name: _of_class(node) for node in classes}


def _of_class(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[field.target.id] = " ".join(str(text).split())
    return found
