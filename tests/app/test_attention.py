"""Attention is shown where it is, for any backbone that returns it, and the model is left as it was."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build

from metaembed import MetaEmbedModel
from metaembed.app import attention
from metaembed.app.attention import AttentionReader, NoAttentionError, find_grid, find_tiles, highlight

TEXT = "a red apple on the table é 日"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 96, 3), dtype=np.uint8))


def tiny(name):
    backbone, processor = build(name)
    return MetaEmbedModel.from_backbone(backbone, processor=processor, num_query_tokens=4, num_document_tokens=8)


@pytest.fixture(scope="module")
def reader(qwen):
    return AttentionReader(qwen)


def test_a_wide_picture_has_more_columns_than_rows(reader):
    seen = reader.read(PICTURE, "document", num_meta=8)
    rows, columns = seen.grid
    assert columns == 2 * rows and rows * columns == len(seen.patches) == len(seen.picture)
    assert seen.weights.shape[1] == 8 and seen.over_picture(3).shape == (rows, columns)
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones(seen.weights.shape[:2]))
    assert seen.share_of_picture(3) == pytest.approx(seen.over_picture(3).sum().item())
    torch.testing.assert_close(
        seen.over_picture(3, layer=None), torch.stack([seen.over_picture(3, i) for i in (0, 1)]).mean(0)
    )


def test_patches_lie_in_the_grid_as_they_lie_in_the_picture(qwen, reader):
    """The corner of a picture is changed: the attention of the first layer changes most in that corner."""
    changed = np.array(PICTURE)
    changed[-16:, -16:] = 0
    before, after = (reader.read(one, "document").weights[0, 0] for one in (PICTURE, Image.fromarray(changed)))
    seen = reader.read(PICTURE, "document")
    ratio = (after / before)[seen.patches].view(seen.grid)  # equal everywhere that only the softmax's sum has changed
    assert (ratio - ratio.median()).abs().argmax() == ratio.numel() - 1


def test_the_words_of_a_text_are_told_from_the_template_around_them(reader):
    seen = reader.read(TEXT, "query")
    assert "".join(text for text, _ in seen.pieces) == TEXT
    assert "日" in [text.strip() for text, _ in seen.pieces], "a letter of several tokens is one piece"
    assert 0 < sum(share for _, share in seen.over_text(0)) < 1
    assert seen.grid is None and seen.share_of_picture(0) == 0
    with pytest.raises(NoAttentionError, match="has no picture"):
        seen.over_picture(0)


@pytest.mark.parametrize(("name", "grid"), [("paligemma", (4, 4)), ("idefics3", (2, 4)), ("mistral3", (2, 4))])
def test_every_way_to_lay_out_a_picture_is_found_without_the_backbones_name(name, grid):
    """A fixed square; tiles with their places; rows that end in a token of their own."""
    seen = AttentionReader(tiny(name)).read({"image": PICTURE, "text": TEXT}, "document")
    assert seen.over_picture(7).shape == grid and len(set(seen.patches)) == grid[0] * grid[1]
    assert "".join(text for text, _ in seen.pieces) == TEXT


def test_a_bidirectional_backbone_shows_as_many_meta_tokens_as_were_asked_for(bert):
    assert AttentionReader(bert).read("a red apple", "query", num_meta=2).weights.shape[:2] == (2, 2)


def test_a_backbone_that_reads_pictures_elsewhere_says_so_in_a_sentence():
    seen = AttentionReader(tiny("mllama")).read(PICTURE, "document")
    with pytest.raises(NoAttentionError, match="does not read the picture as tokens"):
        seen.over_picture(0)


def test_a_backbone_that_returns_no_attention_says_so_in_a_sentence(qwen, monkeypatch):
    reader = AttentionReader(qwen)
    forward = reader._backbone.forward
    monkeypatch.setattr(
        reader._backbone, "forward", lambda **kwargs: forward(**{**kwargs, "output_attentions": False})
    )
    with pytest.raises(NoAttentionError, match="returns no attention"):
        reader.read(TEXT, "query")


def test_maps_that_would_fill_the_memory_are_refused(reader, monkeypatch):
    monkeypatch.setattr(attention, "_MOST_BYTES", 1000)
    with pytest.raises(NoAttentionError, match="smaller or the text shorter"):
        reader.read(TEXT, "query")


def test_reading_changes_nothing_of_the_model_and_copies_no_weights(qwen):
    before = qwen.encode_documents([PICTURE], num_meta=4)
    kind = qwen.backbone.config._attn_implementation
    reader = AttentionReader(qwen)
    reader.read(PICTURE, "document")
    assert qwen.backbone.config._attn_implementation == kind != "eager"
    assert torch.equal(qwen.encode_documents([PICTURE], num_meta=4), before)
    pairs = zip(qwen.backbone.parameters(), reader._backbone.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)


def test_what_is_looked_at_is_what_the_model_computes(qwen, reader):
    features = qwen.processor.process_documents([PICTURE])
    with torch.no_grad():
        mine = qwen.backbone(**features).last_hidden_state
        theirs = reader._backbone(**features).last_hidden_state
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_tiles_are_put_together_row_by_row():
    tile = ["<image>"] * 4
    tokens = ["<s>"]
    for place in ("row_1_col_1", "row_1_col_2", "row_2_col_1", "row_2_col_2"):
        tokens += [f"<{place}>", *tile]
    tokens += ["<global-img>", *tile]
    patches = [place for place, token in enumerate(tokens) if token == "<image>"]
    ordered, grid = find_tiles(patches, tokens)
    assert grid == (4, 4) and ordered == [2, 3, 7, 8, 4, 5, 9, 10, 12, 13, 17, 18, 14, 15, 19, 20]
    assert find_tiles(patches[:-9], tokens) is None, "a tile is missing"
    assert find_tiles([1, 2], ["a", "b", "c"]) is None, "these are no tiles"


def test_a_grid_counts_only_if_it_is_exactly_the_patches():
    grid = {"image_grid_thw": torch.tensor([[1, 8, 12]])}
    assert find_grid(24, grid, 1, None)[0] == (4, 6)
    assert find_grid(96, grid, 1, None)[0] == (8, 12)
    pixels = {"pixel_values": torch.zeros(1, 3, 32, 64)}
    assert find_grid(32, pixels, 1, (640, 480))[0] == (4, 8), "of what the processor made of the picture"
    assert find_grid(23, pixels, 1, None)[0] is None
    assert "2 pictures" in find_grid(32, pixels, 2, None)[1]
    assert "3 tiles" in find_grid(32, {"pixel_values": torch.zeros(3, 3, 32, 64)}, 1, None)[1]


def test_the_patch_with_the_most_attention_is_highlighted_most():
    weights = torch.zeros(2, 3)
    weights[0, 2], weights[1, 0] = 0.4, 0.2
    shown = np.asarray(highlight(Image.new("RGB", (30, 20), "white"), weights)).astype(int)
    blue = shown[..., 2]  # a highlighter takes the blue away
    assert blue[5, 25] < blue[15, 5] < 255 == blue[5, 5] == blue[15, 25]
