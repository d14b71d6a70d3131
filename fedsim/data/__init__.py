"""Training and test examples of a configuration: embedded, from local files, or fetched."""

from fedsim.data.loading import Dataset, labels, load

__all__ = ["Dataset", "labels", "load"]
