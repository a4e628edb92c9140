"""From token ids to token ids: prompt cache, decoding, sampling, output."""
