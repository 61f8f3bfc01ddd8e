"""Pictures and pages that people look at: each one file, without a network."""
