"""Loads the training and test examples of a configuration: embedded, from local files, or fetched."""

from fedsim.data.loading import Dataset, check, load
from fedsim.data.sets import labels

__all__ = ["Dataset", "check", "labels", "load"]
