"""Evidence that is larger than a script: each folder is a study, with the commands that repeat it."""
