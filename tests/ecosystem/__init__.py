"""Tools of others that attach to the model from outside. Not in the default run: `make test-ecosystem`."""
