"""Answers from a trained model. Nothing here imports `unimed.train`."""
