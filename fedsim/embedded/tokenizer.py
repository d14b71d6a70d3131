"""Builds the embedded model's tokenizer: byte-level BPE with one token for every word of the generated text and for every digit.

Any text encodes and decodes exactly, because every byte is a token; a word outside the vocabulary becomes bytes.
"""

from collections.abc import Iterable
from typing import Any

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

_PIECES = r"[ /]?\p{L}+| ?\d:?|\n+|##| ?[^\s\p{L}\d#]+|\s|."
"""Words (with a space or slash before them), single digits, line ends, pairs of #, other signs.

The colon of "Answer1:" joins its digit, so that an option directly follows its number: a small model looks back no farther.
"""


def _pre_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def build(texts: Iterable[str]) -> Any:
    """Returns a PreTrainedTokenizerFast whose vocabulary is every byte and every piece of `texts`, in alphabetical order.

    It prepends <bos> to a text that is encoded with special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pre_tokenizer = _pre_tokenizer()
    pieces = {piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [PAD, BOS, EOS, *alphabet, *sorted(pieces - set(alphabet))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False, model_max_length=512
    )
