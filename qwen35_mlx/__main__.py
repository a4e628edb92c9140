"""`python -m qwen35_mlx`: the command, where its program is not on the PATH."""

from .cli.main import main

if __name__ == "__main__":
    main()
