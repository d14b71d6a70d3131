"""The default data and base model, both made by this project, so that a first run downloads nothing."""

from pathlib import Path

from fedsim.errors import UserError
from fedsim.types import Example, Family

BASE_MODEL = Path(__file__).parent / "base_model"
"""Folder of the embedded base model with its tokenizer, in Hugging Face form."""

FAMILIES = (Family.arithmetic, Family.commonsense)
"""The task families of the embedded examples."""


def examples(family: Family, split: str, count: int, seed: int) -> list[Example]:
    """Returns `count` different examples of the split "train" or "test".

    Guarantees: the same arguments give the same list; a shorter list is a prefix of a longer one; a question of one
    split is never in the other, for any two seeds, because a hash of the question decides its split.
    Raises UserError for an unknown split or more examples than can be made.
    """
    from fedsim.embedded import arithmetic, commonsense

    if split not in ("train", "test"):
        raise UserError(f"Expected the split 'train' or 'test', got {split!r}.")
    draw = {Family.arithmetic: arithmetic.draw, Family.commonsense: commonsense.draw}[family]
    found = draw(split, count, seed)
    if len(found) < count:
        raise UserError(f"Expected at most {len(found)} embedded {family.name} {split} examples, got {count}; ask for fewer.")
    return found
