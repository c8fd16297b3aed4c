"""What a model is worth, and the page that says so."""
