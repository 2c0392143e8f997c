"""``python -m cmoe_kernels``: the doctor."""

import sys

from cmoe_kernels.doctor import report

if len(sys.argv) > 1:
    print(__doc__ if sys.argv[1] in ("-h", "--help") else f"python -m cmoe_kernels takes no arguments, got {' '.join(sys.argv[1:])}")
    sys.exit(0 if sys.argv[1] in ("-h", "--help") else 2)
print(report())
