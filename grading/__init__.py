"""Is this answer the gold? Text in, verdict out; no text of a model is run."""
