"""How good answers are, against answers that need no image."""
