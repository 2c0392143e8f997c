"""Sources of annotations that `unimed data build-imax` joins, one file each. Every layout of `unimed.DATASETS` is one, too."""

from unimed.datasets.sources import chest_imagenome, chexmask, edema, mimic_cxr_jpg, ms_cxr, nih_boxes, padchest, vindr_cxr
from unimed.datasets.sources.spec import SOURCES, Known, Row, SourceSpec

__all__ = ["SOURCES", "Known", "Row", "SourceSpec"]

_FILES = (mimic_cxr_jpg, chexmask, chest_imagenome, ms_cxr, vindr_cxr, nih_boxes, padchest, edema)
SOURCES.update({file.SOURCE.name: file.SOURCE for file in _FILES})
