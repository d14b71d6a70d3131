"""Converts encoded examples of one kind to one flat array, which a file can hold and several processes can map, and back.

    [kind, number of examples | facts of each example | tokens and segments of each example]

The facts are the lengths of tokens and segments, and the other fields of `EncodedExample` or `EncodedLabelled`.
"""

from collections.abc import Sequence

import numpy as np

from fedsim.types import AnyEncoded, EncodedExample, EncodedLabelled, Tokens

EXAMPLES, LABELLED = 0, 1
HEAD, FACTS = 2, 4


def flattened(examples: Sequence[AnyEncoded]) -> Tokens:
    """Returns the examples, all of one kind, as one array [entries]."""
    facts, parts = [], []
    for example in examples:
        segments, *others = (
            (example.segments, example.split, example.label)
            if isinstance(example, EncodedLabelled)
            else (np.empty(0, dtype=np.int32), 0, example.loss_start)
        )
        facts.append((example.num_tokens, len(segments), *others))
        parts += [example.input_ids, segments]
    head = (LABELLED if isinstance(examples[0], EncodedLabelled) else EXAMPLES, len(examples))
    return np.concatenate([np.array(head, dtype=np.int32), np.array(facts, dtype=np.int32).ravel(), *parts])


def unflattened(flat: Tokens) -> list[AnyEncoded]:
    """Returns the examples in an array made by `flattened`, as views of it."""
    kind, count = flat[:HEAD].tolist()
    facts = flat[HEAD : HEAD + FACTS * count].reshape(count, FACTS)
    ends = HEAD + FACTS * count + facts[:, :2].sum(axis=1, dtype=np.int64).cumsum()
    found: list[AnyEncoded] = []
    for (num_tokens, num_segments, split, number), end in zip(facts.tolist(), ends.tolist(), strict=True):
        middle = end - num_segments
        ids, segments = flat[middle - num_tokens : middle], flat[middle:end]
        found.append(EncodedLabelled(ids, segments, number, split) if kind == LABELLED else EncodedExample(ids, number))
    return found
