"""What a folder says about pictures; placeholders that compare by the picture behind them."""

import copy
import json

import numpy as np
import pytest
from media_files import PICTURE_CONFIG, SETTINGS, SMALL, VIDEO_CONFIG, numbered, pattern

from qwen35_mlx.errors import ConfigError
from qwen35_mlx.media.pictures import Picture, open_picture
from qwen35_mlx.media.settings import VisionSettings, read_settings
from qwen35_mlx.media.tokens import MediaToken
from qwen35_mlx.media.video import open_video


@pytest.fixture
def folder(tmp_path):
    """Writes the files of a folder, and reads its settings."""

    def read(picture=None, video=None, nested=None) -> VisionSettings | None:
        for name, value in {
            "preprocessor_config.json": picture,
            "video_preprocessor_config.json": video,
            "processor_config.json": nested,
        }.items():
            (tmp_path / name).unlink(missing_ok=True)
            if value is not None:
                (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return read_settings(tmp_path)

    return read


def test_a_released_folder(folder):
    assert folder(PICTURE_CONFIG, VIDEO_CONFIG) == SETTINGS
    assert folder() is None


def test_without_a_file_for_videos_there_are_none(folder):
    """The defaults in the code of the official processor are those of another model."""
    assert folder(PICTURE_CONFIG).video_max_pixels is None


def test_the_nested_file_goes_first(folder):
    other = PICTURE_CONFIG | dict(size=dict(shortest_edge=1024, longest_edge=4096))
    nested = dict(image_processor=other, video_processor=VIDEO_CONFIG | dict(fps=1, max_frames=9))
    settings = folder(PICTURE_CONFIG, VIDEO_CONFIG, nested)
    assert (settings.min_pixels, settings.max_pixels) == (1024, 4096)
    assert (settings.fps, settings.max_frames) == (1.0, 9)
    assert folder(PICTURE_CONFIG, None, dict(processor_class="Qwen3VLProcessor")).fps == 2.0


def test_pixels_at_the_top_go_before_the_size(folder):
    settings = folder(PICTURE_CONFIG | dict(min_pixels=2048, max_pixels=8192))
    assert (settings.min_pixels, settings.max_pixels) == (2048, 8192)


@pytest.mark.parametrize(
    "change",
    [
        dict(size=None),
        dict(size=dict(shortest_edge=65536)),
        dict(size=dict(height=224, width=224)),
        dict(size=dict(shortest_edge=9, longest_edge=8)),
        dict(patch_size=None),
        dict(patch_size=0),
        dict(patch_size=True),
        dict(patch_size=16.0),
        dict(merge_size="2"),
        dict(temporal_patch_size=1),
        dict(image_mean=None),
        dict(image_mean=[0.5]),
        dict(image_std=[0.5, 0.5, 0.0]),
        dict(image_std=[0.5, 0.5, float("nan")]),
        dict(do_resize=False),
        dict(resample=2),
        dict(rescale_factor=1 / 256),
        dict(image_processor_type="CLIPImageProcessor"),
    ],
    ids=str,
)
def test_what_would_give_other_pixels_is_refused(folder, change):
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json.*cannot be used"):
        folder(PICTURE_CONFIG | change)


def test_files_that_are_no_settings_are_refused(folder):
    for text in ("[]", "{", "null", "[" * 100_000):
        with pytest.raises(ConfigError, match=r"preprocessor_config\.json"):
            folder(text)
    with pytest.raises(ConfigError, match="image_processor cannot be used"):
        folder(nested=dict(image_processor=3))
    with pytest.raises(ConfigError, match="other patches"):
        folder(PICTURE_CONFIG, VIDEO_CONFIG | dict(patch_size=14))


def test_a_limit_of_tokens_only_lowers():
    assert open_picture(pattern(1366, 768), SETTINGS.with_tokens(300)).num_tokens <= 300
    assert open_picture(pattern(30, 20), SETTINGS.with_tokens(8)).num_tokens <= 8
    assert SETTINGS.with_tokens(10**9) == SETTINGS
    with pytest.raises(ConfigError):
        SETTINGS.with_tokens(0)


def tokens(media) -> list[int]:
    return [token for span in media.spans for token in span.tokens()]


def test_equal_pictures_have_equal_placeholders_and_others_none_in_common():
    array = pattern(160, 128)
    picture = open_picture(array, SMALL)
    assert tokens(picture) == tokens(open_picture(array.copy(), SMALL, name="again"))
    changed = array.copy()
    changed[0, 0, 0] ^= 255
    coarser = VisionSettings(8, 2, 2, SMALL.mean, SMALL.std, 2**14, 2**16)
    turned = Picture("turned", (1, 1), picture.pixels.swapaxes(0, 1).copy(), SMALL)
    reshaped = Picture("same bytes", (1, 1), picture.pixels.reshape(turned.pixels.shape), SMALL)
    others = [open_picture(changed, SMALL), open_picture(array, coarser), turned, reshaped]
    seen = set(tokens(picture))
    for other in others:
        assert len(tokens(other)) == other.num_tokens
        assert seen.isdisjoint(tokens(other))
        seen.update(tokens(other))
    assert len(seen) == picture.num_tokens + sum(other.num_tokens for other in others)


def test_placeholders_are_no_ids_of_a_vocabulary():
    large = Picture("large", (1, 1), np.zeros((2048, 4096, 3), np.uint8), SETTINGS)
    values = tokens(large)
    assert len(set(values)) == len(values) == large.num_tokens
    assert -(2**63) < min(values) < -(2**60) and max(values) < -1


def test_groups_of_equal_frames_have_placeholders_of_their_own():
    video = open_video([numbered(1)[0]] * 6, SMALL, fps=2)
    assert len(video.spans) == 3
    assert len(set(tokens(video))) == video.num_tokens


def test_a_placeholder_knows_its_picture_through_slices_and_copies():
    span = open_picture(pattern(160, 128), SMALL).spans[0]
    prompt = [1, 2, *span.tokens(), 3]
    for same in (prompt[1:], copy.deepcopy(prompt)[1:], copy.copy(prompt)[1:]):
        assert isinstance(same[4], MediaToken)
        assert (same[4].span, same[4].index) == (span, 3)
        assert same == prompt[1:]
    assert json.loads(json.dumps(prompt)) == prompt
