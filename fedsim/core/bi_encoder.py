"""An encoder that encodes the two texts of a pair separately and compares the encodings (Sentence-BERT, arXiv 1908.10084).

A text is represented by the mean of its token states, scaled to unit length; the head sees (u, v, |u - v|), or u if there is one text.
Sentence encoders are pre-trained for exactly this, but not for reading both texts in one sequence; so little is left to learn that it
survives the noise of DP-SGD.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class BiEncoder(nn.Module):
    """The body of a sequence classifier, under its own name, with a head over the one or two texts of a row.

    Both texts of a row are neighbours in the body's batch, so groups of rows stay contiguous.
    """

    def __init__(self, whole: Any, texts: int = 2) -> None:
        super().__init__()
        self.texts = texts
        self.config, self.base_model_prefix = whole.config, whole.base_model_prefix
        setattr(self, self.base_model_prefix, whole.base_model)
        first = next(whole.base_model.parameters())
        width = (1 if texts == 1 else 3) * self.config.hidden_size
        self.classifier = nn.Linear(width, self.config.num_labels, device=first.device, dtype=first.dtype).requires_grad_(False)
        self.train(whole.training)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the body's blocks keep only their inputs for the backward pass; the name is that of transformers."""
        return bool(getattr(self, self.base_model_prefix).is_activation_checkpointing)

    def get_output_embeddings(self) -> None:
        """Returns None, as transformers models without logits over a vocabulary do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Returns the `logits` [rows, labels] of tokens [rows, texts, tokens], or [rows, tokens]; the mask is 1 for tokens, else 0."""
        mask = attention_mask.flatten(0, -2)
        states = getattr(self, self.base_model_prefix)(input_ids=input_ids.flatten(0, -2), attention_mask=mask).last_hidden_state
        shown = mask.unsqueeze(-1).to(states.dtype)
        means = functional.normalize((states * shown).sum(1), dim=-1)
        if self.texts == 1:
            return SimpleNamespace(logits=self.classifier(means))
        u, v = means.view(-1, self.texts, means.shape[-1]).unbind(1)
        return SimpleNamespace(logits=self.classifier(torch.cat([u, v, (u - v).abs()], dim=-1)))
