"""Faster twins of the model's parts and of what is around it; each stands beside the plain one in a test."""
