"""Federated fine-tuning of language models: Fed-SB and its rivals, with every byte counted."""

import os

__version__ = "0.1.0"

# Nearly every pass has a size of its own. What libraries keep for each size they ask here, when torch is imported or a GPU is used first; a
# variable that is set already stays as it is.
_FOR_MANY_SIZES = {
    # oneDNN and PyTorch keep the kernels of 1,024 products each unless told otherwise: 300 to 700 MB after some dozens of rounds, and no
    # faster (`make bench ARGS="--only d"`). With 64 of oneDNN's, private batches, of all sizes, make them anew: 9 % of DP-SGD.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "64",
    # On a GPU, blocks of one pass would not fit the next: segments that grow leave no gaps.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # On Hopper PyTorch takes cuDNN's attention first, which makes a plan for each number of rows and tokens, so for each token of answers:
    # 30 ms to half a second (pytorch/pytorch#155958, modelscope/FunASR#3704). Flash attention needs none.
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
}
_FOR_SHARED_CORES = {
    # Threads of torch wait for each other in a loop before they sleep, by default for milliseconds, which two runs on the same cores take
    # from each other: each came to a twentieth of its speed alone. So long as this costs nothing when alone, and each comes to a fifth.
    "GOMP_SPINCOUNT": "10000",
}
for _variable, _value in (_FOR_MANY_SIZES | _FOR_SHARED_CORES).items():
    os.environ.setdefault(_variable, _value)
