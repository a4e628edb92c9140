"""From prompt ids to output: prompt cache, decoding, sampling, parsing, scheduling."""
