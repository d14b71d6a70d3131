"""One suite that measures fedsim beside what people use today: `make bench`, or `python -m experiments.benchmarks --help`."""
