"""Two diagrams as a PNG; needs matplotlib."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from qwen35_mlx.errors import extra
from qwen35_mlx.files import write_errors, write_file


@contextmanager
def picture(file: Path, inches: tuple[float, float]) -> Iterator[tuple[Any, Any, Any]]:
    """A figure with its left and right axes, written to `file` as a PNG after the block.

    Raises Qwen35Error without matplotlib, or if the file cannot be written.
    """
    with extra("plot", "a picture needs matplotlib"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=inches, layout="constrained")
    yield figure, *figure.subplots(1, 2)
    png = BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    with write_errors(file):
        write_file(file, png.getvalue())
