"""Encoding lives with training, which may not import this layer; here it is offered to the readers of data."""

from fedsim.training.encoding import encode, encode_prompt, has_response

__all__ = ["encode", "encode_prompt", "has_response"]
