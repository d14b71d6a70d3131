"""One suite that measures fedsim beside what people use today: `make bench`, or `python -m experiments.benchmarks --help`."""

import fedsim  # noqa: F401 - before torch, which reads how many kernels it keeps when it is imported
