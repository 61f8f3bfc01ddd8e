"""One file an implementation: where its arithmetic parts from transformers', as named bits."""
