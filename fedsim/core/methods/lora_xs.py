"""Federated LoRA-XS (arXiv 2405.17604): Fed-SB on the top singular vectors of the base weights, R near zero; the bases cost no bytes."""

from dataclasses import replace

from fedsim.choices import Init
from fedsim.core.methods.fed_sb import FED_SB

LORA_XS = replace(FED_SB, name="lora_xs", inits=(Init.weight_svd,))
