"""Video files through PyAV: frames are counted by packets, selected by time, and rotated."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MediaError, extra
from .pictures import too_large

if TYPE_CHECKING:
    from PIL.Image import Image

# Without playlists and similar formats, which make FFmpeg open other files and addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
FORMATS_READ = "MP4, MOV, MKV, WebM, AVI, MPEG, FLV, Ogg, WMV, or an animated GIF, PNG or WebP"
# 8K is 7680x4320; a decoder holds several frames.
MAX_FRAME_PIXELS = 2**25
MAX_PACKETS = 2**20
NUM_THREADS = 4
# A file with a smaller share of the frames in its header is an incomplete download.
MIN_COMPLETE = 0.9


class VideoFile:
    """Reads all packets for the times of the frames, then decodes the file."""

    def __init__(self, file: Any, name: str, kind: str):
        with extra("video", f"{name}: reading videos takes one more package", MediaError):
            import av
        self.av, self.file, self.name, self.kind = av, file, name, kind
        self.container = self._open()
        try:
            self._count()
        except BaseException:
            self.container.close()
            raise

    def _open(self) -> Any:
        """FFmpeg gets the open file without a name, and may not open anything else."""
        self.file.seek(0)
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
        try:
            container = self.av.open(self.file, options=options)
        except self.av.error.FFmpegError as error:
            if self.kind.startswith("a video"):
                raise MediaError(
                    f"{self.name} is damaged or incomplete", got=f"{self.kind}: {error.strerror}"
                ) from None
            raise MediaError(
                f"{self.name} is not a readable video", got=self.kind, expected=FORMATS_READ
            ) from None
        if not container.streams.video:
            container.close()
            raise MediaError(f"{self.name} holds no video", got=self.kind)
        return container

    def _count(self) -> None:
        stream = self.container.streams.video[0]
        self._check_size(stream.codec_context.width, stream.codec_context.height)
        stamps: list[int] = []
        # AVI numbers its frames in decoding order.
        self.has_times = self.container.format.name != "avi"
        for packet in self.container.demux(stream):
            # The last packet is empty: it flushes the decoder.
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None or packet.is_discard:
                continue
            stamps.append(stamp)
            self.has_times = self.has_times and packet.pts is not None
            if len(stamps) > MAX_PACKETS:
                raise MediaError(
                    f"{self.name} is too long", expected=f"at most {MAX_PACKETS:,} frames"
                )
        if len(stamps) < stream.frames * MIN_COMPLETE:
            raise MediaError(
                f"{self.name} is incomplete", got=f"{len(stamps)} of {stream.frames} frames"
            )
        self.stamps = sorted(stamps)
        self.times: Sequence[float] = [float(s * stream.time_base) for s in self.stamps]
        rate = stream.average_rate
        self.fps = float(rate) if rate else None

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        """Decode up to the last wanted frame."""
        # Without presentation times, frames are counted in decoder output order.
        wanted = [self.stamps[index] if self.has_times else index for index in indices]
        place, shown = 0, None
        for number, frame in enumerate(self._frames()):
            moment = frame.pts if self.has_times else number
            if moment is None:
                continue
            # Where the decoder skips a frame, the previous one is still shown.
            while place < len(wanted) and shown is not None and wanted[place] < moment:
                yield self._upright(shown)
                place += 1
            shown = frame
            if place == len(wanted):
                return
        if shown is None:
            raise MediaError(f"{self.name} holds no frame that can be decoded")
        for _ in wanted[place:]:
            yield self._upright(shown)

    def _frames(self) -> Iterator[Any]:
        self.container.close()
        self.container = self._open()
        stream = self.container.streams.video[0]
        stream.thread_type, stream.thread_count = "AUTO", NUM_THREADS
        for frame in self.container.decode(stream):
            self._check_size(frame.width, frame.height)
            yield frame

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_FRAME_PIXELS:
            expected = f"at most {MAX_FRAME_PIXELS / 1e6:.0f} million pixels"
            raise too_large(self.name, f"frames of {width}x{height}", expected)

    def _upright(self, frame: Any) -> "Image":
        """RGB, rotated counterclockwise by the angle in the file, as players do."""
        import numpy as np
        from PIL import Image

        pixels = frame.to_ndarray(format="rgb24")
        turned = np.rot90(pixels, round(frame.rotation / 90) % 4)
        return Image.fromarray(np.ascontiguousarray(turned))

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()
