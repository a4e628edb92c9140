"""The official processors, and torchvision, which prepares the official videos.

torchvision lies in a folder of its own beside the environment (`make live` puts it there):
transformers imports any torchvision that it sees, and one that was built for another torch dies
at import. So this module must be imported before transformers; conftest.py does.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
FOLDER = Path(torch.__file__).parents[4] / "torchvision"


def import_torchvision() -> bool:
    """Import it without the part that needs operators compiled for this torch."""
    if FOLDER.is_dir():
        sys.path.append(str(FOLDER))
    register_fake = torch.library.register_fake

    def skip_torchvision(op: Any, function: Any = None, /, **options: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return (lambda f: f) if function is None else function
        return register_fake(op, function, **options)

    torch.library.register_fake = skip_torchvision
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return False
    finally:
        torch.library.register_fake = register_fake
    return True


HAS_TORCHVISION = import_torchvision()


def picture_processor(values: dict[str, Any]) -> Any:
    """The official processor of pictures that resizes with Pillow, from preprocessor_config."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    return Qwen2VLImageProcessorPil(**values)


def video_processor(values: dict[str, Any]) -> Any:
    """The official processor of videos, from video_preprocessor_config."""
    if not HAS_TORCHVISION:
        pytest.skip("torchvision is not installed; `make live` does")
    from transformers import Qwen3VLVideoProcessor

    return Qwen3VLVideoProcessor(**{"cap_pixels_per_frame": False, **values})


def reference_processor(
    picture: dict[str, Any], video: dict[str, Any], tokenizer: Any
) -> Callable[..., Any]:
    """The official processor of whole prompts: text, pictures and videos to model inputs."""
    videos = video_processor(video)
    from transformers import Qwen3VLProcessor

    return Qwen3VLProcessor(
        image_processor=picture_processor(picture),
        video_processor=videos,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
