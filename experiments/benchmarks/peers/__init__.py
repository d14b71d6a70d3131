"""The software that fedsim is compared with, each run as its users run it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from fedsim.core.fused import ROTATION, Rotation


@contextmanager
def as_written() -> Iterator[None]:
    """Runs the block with transformers' own model code, which peers train.

    Models that it loads are not fused, and parts fused for the whole process (`fedsim.core.fused`) are suspended.
    """
    models = [vars(module) for name, module in [*sys.modules.items()] if name.startswith("transformers.models.")]
    fused = [(names, names[ROTATION]) for names in models if isinstance(names.get(ROTATION), Rotation)]
    try:
        for names, rotation in fused:
            names[ROTATION] = rotation.original
        with mock.patch("fedsim.models.fuse"):
            yield
    finally:
        for names, rotation in fused:
            names[ROTATION] = rotation
