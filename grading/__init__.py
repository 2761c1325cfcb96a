"""Is this answer the gold? Text in, verdict out; the text never runs as code."""
