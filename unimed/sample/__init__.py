"""The built-in data set: real CT and MR slices with organ masks, made into questions. It is a client of `unimed.records`."""

from unimed.sample.build import build_sample

__all__ = ["build_sample"]
