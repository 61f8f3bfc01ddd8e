"""One model on more than one device."""
