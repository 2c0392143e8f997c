"""Uni-Med on fused kernels: data, model, training, evaluation and analysis. Research use, not for diagnosis."""

NOTICE = "Research use, not for diagnosis"
INSTALL = 'pip install "cmoe-kernels[unimed]"'
