"""The demo's training forward, its pictures and its files against transformers."""

import random
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from checkpoint import demo_config, save  # noqa: E402
from data import encode, training_sample  # noqa: E402
from initial import initialize  # noqa: E402
from network import CHUNK, MTP, Batch, Forward, chunk_gated_delta_rule  # noqa: E402
from pictures import paint, patches, picture  # noqa: E402
from reference import Reference  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sight import teach_sight  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from train import collate  # noqa: E402
from transformers import AutoImageProcessor, Qwen3_5MoeForConditionalGeneration  # noqa: E402

from qwen35_mlx.cli.local_models import SOURCE  # noqa: E402

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SOURCE / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Any:
    torch.manual_seed(0)
    config = demo_config(tokenizer.token_to_id, 2560)
    model = Qwen3_5MoeForConditionalGeneration(config)
    initialize(model)
    with torch.no_grad():
        # Some matrices start at zero, which would hide the gradients before them.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_looking_up_is_laid_out(tokenizer: Tokenizer, seed: int) -> None:
    """Untrained: tokens that stood in the same order before are the likelier ones."""
    torch.manual_seed(seed)
    model = Qwen3_5MoeForConditionalGeneration(demo_config(tokenizer.token_to_id, 2560))
    initialize(model)
    ids = torch.randint(20, 2560, (8, 32)).repeat(1, 2)
    places = torch.arange(64).expand(3, 8, 64)
    batch = Batch(ids, ids, places, torch.zeros(8, dtype=torch.long))
    with torch.no_grad():
        losses = Forward(model, MTP(model.config), torch.float32).losses(batch, False)[0]
    first, again = losses.reshape(8, 63)[:, :31].mean(), losses.reshape(8, 63)[:, 32:].mean()
    assert again < first - 1


def test_shapes_come_up_in_a_first_lesson(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = Qwen3_5MoeForConditionalGeneration(demo_config(tokenizer.token_to_id, 2560))
    initialize(model)
    # One in thirty by chance.
    assert teach_sight(model.model.visual, 50, 0.1) > 0.1


def _batch(model: Any, tokenizer: Tokenizer, with_pictures: bool) -> Any:
    rng = random.Random(4)
    rows = []
    while len(rows) < 4:
        sample = picture(rng, False) if with_pictures else training_sample(rng, 0.1)
        if bool(sample.picture) == with_pictures:
            rows.append((*encode(sample, tokenizer), sample))
    pad = tokenizer.token_to_id("<|endoftext|>")
    return collate(rows, pad, model.config.image_token_id)


@pytest.mark.parametrize("with_pictures", [False, True])
def test_loss_and_gradients_are_those_of_transformers(
    model: Any, tokenizer: Tokenizer, with_pictures: bool
) -> None:
    batch = _batch(model, tokenizer, with_pictures)
    forward = Forward(model, MTP(model.config), torch.float32)
    forward.losses(batch, with_mtp=False)[0].mean().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    extra: dict[str, Any] = {}
    if with_pictures:
        types = (batch.ids == model.config.image_token_id).int()
        extra = dict(pixel_values=batch.pixels, image_grid_thw=batch.grid, mm_token_type_ids=types)
        theirs, _ = model.model.get_rope_index(
            input_ids=batch.ids, mm_token_type_ids=types, image_grid_thw=batch.grid
        )
        assert torch.equal(theirs, batch.positions)
    out = model(input_ids=batch.ids, labels=batch.labels, use_cache=False, **extra)
    out.loss.backward()
    mean = forward.losses(batch, with_mtp=False)[0].mean()
    assert abs(out.loss.item() - mean.item()) < 1e-5
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max() + 1e-5
            assert (parameter.grad - ours[name]).abs().max() < 2e-3 * scale, name
    model.zero_grad()


@pytest.mark.parametrize("num_chunks", [1, 2, 5])
def test_the_chunked_rule_is_the_recurrent_one(num_chunks: int) -> None:
    torch.manual_seed(num_chunks)
    B, T, H, Dk, Dv = 2, num_chunks * CHUNK, 3, 8, 16
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, Dk), dim=-1) for _ in range(2))
    v, g, beta = torch.randn(B, T, H, Dv), -torch.rand(B, T, H), torch.rand(B, T, H)
    state = torch.zeros(B, H, Dk, Dv)
    expected = []
    for t in range(T):
        state = state * g[:, t].exp()[..., None, None]
        read = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        delta = (v[:, t] - read) * beta[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], delta)
        expected.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    out = chunk_gated_delta_rule(q, k, v, g, beta)
    assert (out - torch.stack(expected, 1)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def saved(model: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of an untrained checkpoint, and its MTP layer."""
    out, mtp = tmp_path_factory.mktemp("saved"), MTP(model.config)
    save(model, mtp, out, tokenizer.token_to_id)
    (out / "tokenizer.json").write_text((SOURCE / "tokenizer.json").read_text())
    return out, mtp


# torchvision's class, where it is there, reads Pillow's memory in place.
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_patches_are_those_of_the_image_processor(saved: Any) -> None:
    pictures = [paint("star", "red", 20, 25, 12), paint("circle", "blue", 30, 18, 15)]
    processor = AutoImageProcessor.from_pretrained(saved[0])
    theirs = processor(images=pictures, return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, 6, 6]] * 2
    assert np.abs(theirs["pixel_values"].numpy() - patches(pictures)).max() < 1e-5


def test_drafts_depend_on_nothing_after_the_token_before_them(
    model: Any, tokenizer: Tokenizer
) -> None:
    batch = _batch(model, tokenizer, False)
    torch.manual_seed(1)
    forward = Forward(model, MTP(model.config), torch.float32)
    rows = torch.zeros_like(batch.ids[:, 1:], dtype=torch.bool)
    rows[:, 10] = True

    def drafts(ids: Any) -> Any:
        embedded, hidden, rope = forward.hidden(batch._replace(ids=ids))
        return forward.draft(embedded, hidden, rope, rows)

    with torch.no_grad():
        base = drafts(batch.ids)
        later, next_token = batch.ids.clone(), batch.ids.clone()
        later[:, 12:] = 5
        next_token[:, 11] = 5
        assert torch.allclose(base, drafts(later), atol=1e-5)
        assert not torch.allclose(base, drafts(next_token), atol=1e-3)


def test_a_saved_checkpoint_comes_back(model: Any, tokenizer: Tokenizer, saved: Any) -> None:
    """Text, vision and MTP weights, with embedding and head apart."""
    folder, mtp = saved
    tensors = load_file(folder / "model.safetensors")
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= set(tensors)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    again = Reference(folder)
    for ours, theirs in ((model, again.model), (mtp, again.mtp)):
        loaded = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor.bfloat16().float(), loaded[name]), name
