"""Federated fine-tuning of language models: Fed-SB and its rivals, with every byte counted."""

import os

__version__ = "0.1.0"

# Nearly every pass has a different size. These variables limit what libraries cache for each size; they are read when torch is imported or
# a GPU is first used. A variable that is already set keeps its value.
_FOR_MANY_SIZES = {
    # By default oneDNN and PyTorch each cache the kernels of 1,024 products: 300 to 700 MB after some dozens of rounds, without a speed-up
    # (`make bench ARGS="--only d"`). With 64 in oneDNN, private batches, which have all sizes, recreate kernels: 9 % of DP-SGD's time.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "64",
    # On a GPU, blocks freed by one pass do not fit the next: expandable segments leave no gaps.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # On Hopper, PyTorch prefers cuDNN's attention, which builds a plan for each number of rows and tokens, so for each generated token:
    # 30 ms to half a second (pytorch/pytorch#155958, modelscope/FunASR#3704). Flash attention needs none.
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
}
_FOR_SHARED_CORES = {
    # Torch's threads spin before they sleep, by default for milliseconds. Two runs on the same cores take that time from each other: each
    # ran at a twentieth of its speed alone. With this count each runs at a fifth, and a run alone loses nothing.
    "GOMP_SPINCOUNT": "10000",
}
for _variable, _value in (_FOR_MANY_SIZES | _FOR_SHARED_CORES).items():
    os.environ.setdefault(_variable, _value)
