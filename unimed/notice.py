"""Two lines that all parts show."""

NOTICE = "Research use, not for diagnosis"
INSTALL = 'pip install "cmoe-kernels[unimed]"'
