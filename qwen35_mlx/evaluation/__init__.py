"""What a model is worth: its speed on this machine, and what it can."""
