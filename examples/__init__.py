"""Examples: scripts to run and read, and ``vnnet``, a whole system."""
