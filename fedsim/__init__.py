"""Federated fine-tuning of language models: Fed-SB and its rivals, with every byte counted."""

import os

__version__ = "0.1.0"

# oneDNN and PyTorch keep the kernels of so many products, and ask here when torch is imported. Each keeps 1,024 unless told otherwise: 300
# to 700 MB after some dozens of rounds, whose passes are all of other sizes, and no faster (`make bench ARGS="--only d"`).
for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_variable, "64")
