"""Videos: equal to the official processor; picked by time, turned, counted, bounded."""

import hashlib
import json
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from media_files import (
    SAMPLINGS,
    SETTINGS,
    SMALL,
    VIDEO_SIZES,
    VIDEOS,
    animated,
    encoded,
    number_of,
    numbered,
    pattern,
    pattern_image,
    video_bytes,
)
from PIL import Image

from qwen35_mlx.errors import MediaError
from qwen35_mlx.media import containers, settings, video
from qwen35_mlx.media.patches import video_size
from qwen35_mlx.media.settings import VisionSettings
from qwen35_mlx.media.video import Video, frame_budget, open_video, sample

GOLDEN = json.loads((Path(__file__).parent / "golden" / "media.json").read_text())


@pytest.mark.parametrize("name", VIDEOS)
def test_patches_have_the_bits_of_the_official_processor(name):
    count, fps, width, height = VIDEOS[name]
    frames = [pattern(width, height, seed=n) for n in range(count)]
    opened, golden = open_video(frames, SETTINGS, fps=fps), GOLDEN["videos"][name]
    assert list(opened.grid) == golden["grid"]
    assert [round(s * fps) for s in opened.seconds] == golden["indices"]
    assert list(opened.timestamps) == golden["timestamps"]
    patches = opened.patches().astype("<f4")
    assert hashlib.sha256(patches).hexdigest() == golden["sha256"]


def test_sizes_are_those_of_the_official_processor():
    ours = [
        list(video_size(height, width, frames, SETTINGS, frame_budget(frames, SETTINGS)))
        for width, height, frames in VIDEO_SIZES
    ]
    assert ours == GOLDEN["video_sizes"]


def test_frames_are_picked_as_by_the_official_processor():
    for (total, fps), golden in zip(SAMPLINGS, GOLDEN["samplings"], strict=True):
        indices, seconds = sample([n / fps for n in range(total)], fps, SETTINGS)
        assert indices == golden
        assert seconds == [index / fps for index in golden]


def test_a_cap_a_frame_is_the_one_of_the_official_processor(monkeypatch):
    """1080p: 4,080 tokens without it, 1,440 with it; from 60 frames on nothing changes."""
    monkeypatch.setattr(settings, "CAP_PIXELS_PER_FRAME", 768 * 32 * 32)
    height, width = video_size(1080, 1920, 4, SETTINGS, frame_budget(4, SETTINGS))
    assert height * width * 2 // 1024 == 1440
    assert frame_budget(64, SETTINGS) <= 25165824


@pytest.fixture
def av():
    return pytest.importorskip("av")


def numbers(opened: Video) -> list[int]:
    return [number_of(frame) for frame in opened.frames]


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "libx264"), ("avi", "mpeg4")],
)
def test_frames_of_a_file_are_the_wanted_ones(av, tmp_path, format, codec):
    """libx264 stores frames in another order than they are shown, and AVI keeps no times;
    Matroska does not count its frames.
    """
    (file := tmp_path / "clip").write_bytes(video_bytes(numbered(40), 10, format, codec))
    opened = open_video(file, SMALL)
    wanted = np.linspace(0, 39, 8).round().astype(int).tolist()
    assert numbers(opened) == wanted
    assert np.allclose(opened.seconds, [n / 10 for n in wanted], atol=1e-3)
    assert opened.describe() == "clip, 64x64, 3.9 s, 8 frames, 16 tokens"


@pytest.mark.slow
def test_webm_counts_its_frames_by_packets(av):
    data = video_bytes(numbered(40), 10, "webm", "libvpx-vp9")
    assert numbers(open_video(data, SMALL)) == np.linspace(0, 39, 8).round().tolist()


def test_a_variable_rate_is_picked_by_time(av):
    """One frame stays for six seconds; by index it would be seen once."""
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 6.4, 6.5, 6.6, 6.7, 6.8]
    opened = open_video(video_bytes(numbered(10), 10, times=times), SMALL)
    assert len(opened.frames) == 13
    assert opened.seconds[-1] == pytest.approx(6.8)
    shown = [sum(t <= second + 1e-6 for t in times) - 1 for second in opened.seconds]
    assert numbers(opened) == shown
    assert shown.count(4) > 8


def turned(mp4: bytes, quarters_clockwise: int) -> bytes:
    """The file with another display matrix."""
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters_clockwise]
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    place = mp4.index(b"tkhd") + 44
    return mp4[:place] + matrix + mp4[place + 36 :]


@pytest.mark.parametrize("quarters", range(4))
def test_a_phone_video_is_turned(av, quarters):
    frames = numbered(4, 96, 64)
    opened = open_video(turned(video_bytes(frames, 2), quarters), SMALL)
    upright = np.rot90(frames[3], -quarters)
    assert opened.original_size == (upright.shape[1], upright.shape[0])
    assert np.abs(opened.frames[3].astype(int) - upright).mean() < 12


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_a_video(format):
    frames = [Image.fromarray(frame) for frame in numbered(20)]
    opened = open_video(animated(frames, 100, format), SMALL)
    assert numbers(opened) == [0, 6, 13, 19]
    assert opened.seconds == pytest.approx((0.0, 0.6, 1.3, 1.9))


def test_an_animation_is_picked_by_time():
    frames = [Image.fromarray(frame) for frame in numbered(3)]
    opened = open_video(animated(frames, [100, 4000, 100]), SMALL)
    assert numbers(opened) == [0, 1, 1, 1, 1, 1, 1, 2]


def test_a_picture_is_no_video():
    for source in (encoded(pattern_image(64, 64), "GIF"), [pattern(64, 64)]):
        with pytest.raises(MediaError, match="too short for a video\n  got: 1 frame\n"):
            open_video(source, SMALL)
    with pytest.raises(MediaError, match="too short"):
        open_video([], SMALL)


def test_a_video_of_one_frame_is_too_short(av):
    with pytest.raises(MediaError, match="too short"):
        open_video(video_bytes(numbered(1)), SMALL)


def test_an_odd_number_of_frames_repeats_the_last():
    opened = open_video(numbered(5), SMALL, fps=2)
    rows = opened.patches().reshape(3, -1, 3, 2, 256)
    assert np.array_equal(rows[2, :, :, 0], rows[2, :, :, 1])
    assert opened.timestamps == (0.25, 1.25, 2.0)


def test_times_are_part_of_a_video():
    assert open_video(numbered(4), SMALL, fps=2) != open_video(numbered(4), SMALL, fps=1)
    assert open_video(numbered(4), SMALL, fps=2) == open_video(np.stack(numbered(4)), SMALL, fps=2)


def test_frames_of_different_size_are_refused():
    with pytest.raises(MediaError, match="differ in size"):
        open_video([*numbered(3), *numbered(3, 96, 64)], SMALL, fps=2)


@pytest.mark.slow
def test_only_the_kept_frames_are_held():
    frames = [Image.fromarray(f) for f in numbered(60, 400, 400)]
    data = animated(frames, 100)
    tracemalloc.start()
    try:
        opened = open_video(data, SMALL)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(opened.frames) == 12
    # All of them would be 29 MB.
    assert peak_bytes < opened.frames.nbytes + 3_000_000


@pytest.mark.parametrize("part", [0.5, 0.8])
def test_a_broken_download_is_refused(av, part):
    """The index of an AVI is at its end; its header promises all frames."""
    data = video_bytes(numbered(40), 10, "avi")
    with pytest.raises(MediaError, match=r"video is incomplete|video is damaged or incomplete"):
        open_video(data[: int(len(data) * part)], SMALL)


def test_a_truncated_mp4_is_refused(av):
    data = video_bytes(numbered(40), 10)
    with pytest.raises(MediaError, match="is damaged or incomplete\n  got: a video"):
        open_video(data[: len(data) // 2], SMALL)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{0}'\n",
    ],
)
def test_a_playlist_opens_no_other_file(av, tmp_path, playlist):
    """FFmpeg follows playlists to files and addresses."""
    (tmp_path / "secret.ts").write_bytes(video_bytes(numbered(12), 10, "mpegts"))
    (file := tmp_path / "list.m3u8").write_text(playlist.format(tmp_path / "secret.ts"))
    assert len(open_video(tmp_path / "secret.ts", SMALL).frames) == 4
    with pytest.raises(MediaError, match="is not a readable video"):
        open_video(file, SMALL)


def test_a_picture_given_as_a_video_is_called_one(av):
    with pytest.raises(MediaError, match=r"is not a readable video\n  got: a picture \(JPEG\)"):
        open_video(encoded(pattern_image(64, 64), "JPEG"), SMALL)


def test_sound_alone_is_no_video(av, tmp_path):
    file = tmp_path / "sound.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="holds no video"):
        open_video(file, SMALL)


def test_limits(av, monkeypatch):
    data = video_bytes(numbered(30), 10)
    for module, name, value, what in (
        (video, "MAX_SECONDS", 2, "too long"),
        (containers, "MAX_PACKETS", 20, "too long"),
        (containers, "MAX_FRAME_PIXELS", 4000, "too large"),
    ):
        with monkeypatch.context() as patch, pytest.raises(MediaError, match=what):
            patch.setattr(module, name, value)
            open_video(data, SMALL)
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 64 * 2)
    with pytest.raises(MediaError, match=r"too large.*\n  got: 3 frames"):
        open_video(animated([Image.fromarray(f) for f in numbered(3)], 100), SMALL)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"pip install 'qwen35-mlx\[video\]'"):
        open_video(b"\0\0\0\x18ftypisom", SMALL)


def test_a_model_without_videos_says_so():
    only_pictures = VisionSettings(8, 2, 2, SMALL.mean, SMALL.std, 2304, 2304)
    with pytest.raises(MediaError, match="no settings for videos"):
        open_video(numbered(4), only_pictures)


@pytest.mark.parametrize("source", [3, None, {"a": 1}, [1, 2], [np.zeros((4, 4), float)] * 4])
def test_what_is_no_video_is_refused(source):
    with pytest.raises(MediaError):
        open_video(source, SMALL)
