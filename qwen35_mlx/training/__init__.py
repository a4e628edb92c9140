"""Training of adapters, with mlx-lm's trainer on the model of this package."""
