"""One file for each implementation: how its arithmetic differs from transformers', as named changes."""
