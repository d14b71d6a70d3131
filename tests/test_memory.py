import subprocess
import sys

import pytest
import torch

from fedsim.memory import give_back_gpu_memory

COUNT = """
import resource, sys
import numpy as np
from fedsim.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8_000_000)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def test_freed_memory_is_reused_without_asking_the_kernel():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "not")
    )
    assert 20 * kept < given_back


PEAK = """
import numpy as np
from fedsim.memory import resident_bytes

before = resident_bytes()
large = np.ones(25_000_000)
del large
print(before, resident_bytes(), resident_bytes(peak=True))
"""


def test_the_peak_is_of_this_program_and_not_of_its_parent():
    ballast = b"x" * 400_000_000  # getrusage would report this
    before, after, peak = map(int, subprocess.run([sys.executable, "-c", PEAK], capture_output=True, check=True).stdout.split())
    assert after < before + 100_000_000
    assert 190_000_000 < peak - before < 300_000_000 < len(ballast)


@pytest.mark.gpu
def test_returned_gpu_memory_is_released():
    num_bytes = torch.zeros(1 << 24, device="cuda").nbytes
    kept = torch.cuda.memory_reserved()
    give_back_gpu_memory()
    assert torch.cuda.memory_reserved() <= kept - num_bytes
