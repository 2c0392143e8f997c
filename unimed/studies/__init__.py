"""Studies of training: spectra of gradients, and how tasks pull at shared parameters."""
