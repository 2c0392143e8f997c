"""Answers from a trained model, and how good they are against answers that need no image."""
