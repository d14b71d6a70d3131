"""A real federation of machines: the files that each needs, a trial of it all on one machine, submitting a run, and looking at it."""
