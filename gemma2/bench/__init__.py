"""Speed and memory beside other implementations, on the same weights in the same run."""
