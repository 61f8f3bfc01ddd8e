"""Beside other implementations of Gemma 2: whose rounding is whose."""
