"""The `unimed` command: one file for each group of commands."""
