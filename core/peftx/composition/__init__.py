"""Which plugins there are, under which name, and which go together. Nothing here looks at a model, or needs torch."""
