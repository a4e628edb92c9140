"""The hot operations, each as naive (fp32 truth) and ops (plain MLX, any device)."""
