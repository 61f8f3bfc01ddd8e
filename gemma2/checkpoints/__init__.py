"""Foreign file formats and foreign tensor names, one file each. What leaves this package has Hugging Face's names."""
