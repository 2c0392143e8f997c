"""What keeps the repository in order: python -m tools.versions."""
