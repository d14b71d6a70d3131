"""Training and test examples of a configuration: embedded, from local files, or fetched."""

from fedsim.data.loading import Dataset, check, labels, load

__all__ = ["Dataset", "check", "labels", "load"]
