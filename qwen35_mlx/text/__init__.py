"""Text and token ids: tokenizer, chat templates, and control tokens kept out of text."""
