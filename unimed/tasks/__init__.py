"""Prompts, metrics and majority answers."""
