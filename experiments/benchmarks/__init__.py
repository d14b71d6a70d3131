"""One suite that measures fedsim against the software in use today: `make bench`, or `python -m experiments.benchmarks --help`."""

import fedsim  # noqa: F401 - before torch, which reads how many kernels to cache on import
