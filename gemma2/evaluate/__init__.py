"""Measuring what a model knows: perplexity, benchmarks, and one model against another."""
