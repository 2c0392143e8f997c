"""Checkpoints in the layouts of other projects, into ours and back; one file a layout.

Each converter returns the key map that `unimed convert` prints. Files are read as plain tensors. A folder is written whole or not at all.
"""
