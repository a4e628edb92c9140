"""What a model is worth on this machine: its speed."""
