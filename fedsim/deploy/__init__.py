"""A federation of real machines: the files that each needs, a trial on one machine, submitting runs, and their status."""
