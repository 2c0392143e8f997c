"""Readers of published layouts of data sets, one file each; `load_items` reads them all.

`DATASETS` lists them in the order in which a folder is looked at.
"""

from unimed.datasets import medmnist, medpix, medqa, mimic_cxr, path_vqa, pubmedqa, records, sa_med2d, slake, vqa_rad
from unimed.datasets.load import load_items
from unimed.datasets.spec import DATASETS, DatasetSpec

__all__ = ["DATASETS", "DatasetSpec", "load_items"]

_FILES = (records, slake, sa_med2d, path_vqa, medmnist, mimic_cxr, medpix, medqa, pubmedqa, vqa_rad)
DATASETS.update({file.SPEC.name: file.SPEC for file in _FILES})
