"""Prompts, metrics and the answers one can give without looking."""
