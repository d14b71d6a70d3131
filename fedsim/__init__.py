"""Federated fine-tuning of language models: Fed-SB and its rivals, with every byte counted."""

__version__ = "0.1.0"
