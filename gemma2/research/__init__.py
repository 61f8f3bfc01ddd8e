"""Looking inside: what attaches to named places of the model, and twins of its parts that show more."""
