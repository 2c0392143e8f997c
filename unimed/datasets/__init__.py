"""Readers of published layouts of data sets, one file each; `load_examples` reads them all."""

from unimed.datasets.load import load_examples

__all__ = ["load_examples"]
