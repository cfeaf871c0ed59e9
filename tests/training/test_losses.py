"""Plain MMR equals GradCache MMR equals two ranks, in loss and in gradient, for every kind of batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, assert_same_gradients, gradients, picture, save_tiny_backbone, tiny_encoder
from torch.nn.functional import cross_entropy, dropout

from metaembed import MetaEmbedModel
from metaembed.training.lora import lora_config
from metaembed.training.losses import CachedMMRLoss, MMRLoss

BATCH = 6  # a third of each kind of document


def columns(first=0, count=BATCH, negatives=1):
    """Queries, positives and hard negatives: text, and no, one or two images of different sizes."""

    def document(i):
        kinds = [
            {"text": WORDS[i % 16], "image": picture(i, 32 + 16 * (i % 3), 32)},
            {"image": [picture(i, 48, 32), picture(i + 50, 16, 64)]},
            {"text": " ".join(WORDS[: i % 7 + 1])},
        ]
        return kinds[i % 3]

    rows = range(first, first + count)
    queries = [{"text": f"{WORDS[i % 16]} {WORDS[(3 * i) % 16]}"} for i in rows]
    return [queries] + [[document(i + 100 * column) for i in rows] for column in range(1 + negatives)]


def features(encoder, *args, **kwargs):
    batch = columns(*args, **kwargs)
    return [encoder.preprocess(column, task="document" if i else "query") for i, column in enumerate(batch)]


def loss_and_gradients(loss, batch):
    loss.model.zero_grad()
    parts = loss(batch)
    torch.stack(list(parts.values())).sum().backward()
    return {name: value.detach() for name, value in parts.items()}, gradients(loss.model)


def assert_equal_parts(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-12, rtol=1e-10)


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder(double=True).train()


@pytest.fixture(scope="module")
def dial():
    """An encoder whose tokens are trained too."""
    return tiny_encoder(double=True, token_projection=True).train()


@pytest.mark.parametrize("normalize", ["sum", "mean", "sqrt"])
@pytest.mark.parametrize("negatives", [0, 2])
def test_the_loss_is_the_formula_written_out(encoder, normalize, negatives):
    batch = features(encoder, negatives=negatives)
    loss = MMRLoss(encoder, weights=[1, 0.5, 2], normalize=normalize)
    actual, _ = loss_and_gradients(loss, [dict(column) for column in batch])
    queries, *documents = (encoder(dict(f))["token_embeddings"].detach() for f in batch)
    documents = torch.cat(documents)
    for (r_q, r_c), weight in zip([(1, 1), (2, 4), (4, 8)], [1, 0.5, 2], strict=True):
        divisor = {"sum": 1, "mean": r_q, "sqrt": r_q**0.5}[normalize]
        logits = torch.zeros(len(queries), len(documents), dtype=torch.float64)
        for q in range(len(queries)):
            for d in range(len(documents)):
                similarity = queries[q, :r_q] @ documents[d, :r_c].T
                logits[q, d] = similarity.max(dim=1).values.sum() / divisor / 0.03
        expected = weight * cross_entropy(logits, torch.arange(len(queries)))
        torch.testing.assert_close(actual[f"loss_{r_q}x{r_c}"], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("weights", [{"tokens_tokens": 1, "meta_tokens": 0.5, "tokens_meta": 2}, {"meta_tokens": 3}])
def test_the_token_terms_are_the_formula_written_out(dial, weights):
    """Each document's own tokens and no others count, and the root of the query's own number of vectors divides."""
    batch = features(dial, negatives=1)
    loss = MMRLoss(dial, token_terms=weights)
    actual, _ = loss_and_gradients(loss, [dict(column) for column in batch])
    kinds = {}
    for side, inputs in (("query", columns()[0]), ("document", [*columns()[1], *columns()[2]])):
        for_each = [dial.preprocess([x], task=side) for x in inputs]
        with torch.no_grad():
            rows = [dial(each, task=side, tokens=True)["token_embeddings"][0] for each in for_each]
        r = {"query": 4, "document": 8}[side]
        kinds[side] = {"meta": [each[:r] for each in rows], "tokens": [each[r:] for each in rows]}
    assert len({len(rows) for rows in kinds["query"]["tokens"]}) > 1 < len({*map(len, kinds["document"]["tokens"])})
    assert set(actual) == {"loss_1x1", "loss_2x4", "loss_4x8", *(f"loss_{name}" for name in weights)}
    for name, weight in weights.items():
        queries, documents = (kinds[side][kind] for side, kind in zip(kinds, name.split("_"), strict=True))
        logits = [[(q @ d.T).max(dim=1).values.sum() / len(q) ** 0.5 / 0.03 for d in documents] for q in queries]
        expected = weight * cross_entropy(torch.tensor(logits, dtype=torch.float64), torch.arange(len(queries)))
        torch.testing.assert_close(actual[f"loss_{name}"], expected, atol=1e-6, rtol=0)


def test_the_recommended_weights_scale_their_terms_and_no_others(dial):
    """Those of docs/full-dial.md, in both losses."""
    weights = {"tokens_tokens": 4, "meta_tokens": 1, "tokens_meta": 1}
    expected = MMRLoss(dial, token_terms=True)(features(dial))
    expected["loss_tokens_tokens"] = 4 * expected["loss_tokens_tokens"]
    for kind in (MMRLoss, CachedMMRLoss):
        assert_equal_parts(kind(dial, token_terms=weights)(features(dial)), expected)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("mixes_images", [True, False])
def test_cached_equals_plain_with_token_terms(dial, negatives, mixes_images):
    traits = dial[0].model.config.traits
    traits.mixes_images = mixes_images
    try:
        batch = features(dial, negatives=negatives)
    finally:
        traits.mixes_images = True
    expected = loss_and_gradients(MMRLoss(dial, token_terms=True), batch)
    assert any("token_projection" in name for name in expected[1])
    for kind, options in (
        *((CachedMMRLoss, {"mini_batch_size": size}) for size in (1, 4)),
        (MMRLoss, {"score_mini_batch_size": 4}),
    ):
        actual = loss_and_gradients(kind(dial, token_terms=True, **options), batch)
        assert_equal_parts(actual[0], expected[0])
        assert_same_gradients(actual[1], expected[1])


def test_without_token_terms_a_loss_is_as_it_was(encoder, dial):
    """Bit for bit: the projection of the tokens changes nothing, and gets no gradient."""
    expected, actual = (loss_and_gradients(MMRLoss(each), features(each)) for each in (encoder, dial))
    assert expected[0] == actual[0]
    assert expected[1].keys() == actual[1].keys() and all(expected[1][n].equal(actual[1][n]) for n in expected[1])


@pytest.mark.parametrize("terms", [True, {"tokens_meta": 1}])
def test_token_terms_need_a_model_that_gives_tokens(encoder, terms):
    for kind in (MMRLoss, CachedMMRLoss):
        with pytest.raises(ValueError, match=r"from_backbone\(..., token_projection=True\)"):
            kind(encoder, token_terms=terms)


@pytest.mark.parametrize("terms", [{"tokens": 1}, {"tokens_meta": -1}])
def test_bad_token_terms_are_named(dial, terms):
    with pytest.raises(ValueError, match="token_terms must map some of tokens_tokens, meta_tokens, tokens_meta"):
        MMRLoss(dial, token_terms=terms)


@pytest.mark.parametrize("causal", [True, False])
def test_token_terms_need_all_meta_tokens(dial, causal):
    dial[0].model.config.traits.causal = causal
    try:
        batch = [dial.preprocess(["a"], task="query", num_meta=2), dial.preprocess(["b"], task="document")]
    finally:
        dial[0].model.config.traits.causal = True
    for kind in (MMRLoss, CachedMMRLoss):
        with pytest.raises(ValueError, match="token_terms need all 4 vectors of a query, got 2"):
            kind(dial, budgets=[(1, 1)], token_terms=True)(batch)


@pytest.mark.parametrize("mini_batch_size", [1, 4, 100])
@pytest.mark.parametrize("negatives", [0, 2])
def test_cached_equals_plain(encoder, mini_batch_size, negatives):
    batch = features(encoder, negatives=negatives)
    expected = loss_and_gradients(MMRLoss(encoder), batch)
    actual = loss_and_gradients(CachedMMRLoss(encoder, mini_batch_size=mini_batch_size), batch)
    assert_equal_parts(actual[0], expected[0])
    assert_same_gradients(actual[1], expected[1])


def test_cached_by_tokens_equals_plain(encoder):
    batch = features(encoder)
    expected = loss_and_gradients(MMRLoss(encoder), batch)
    actual = loss_and_gradients(CachedMMRLoss(encoder, mini_batch_num_tokens=60), batch)
    assert_equal_parts(actual[0], expected[0])
    assert_same_gradients(actual[1], expected[1])


def test_cached_equals_plain_where_images_may_not_mix():
    """Batches that the backbone needs in groups are split into mini-batches too."""
    encoder = tiny_encoder(double=True).train()
    whole = loss_and_gradients(MMRLoss(encoder), features(encoder))
    encoder[0].model.config.traits.mixes_images = False
    batch = features(encoder)
    assert "groups" in batch[1]
    plain = loss_and_gradients(MMRLoss(encoder), batch)
    cached = loss_and_gradients(CachedMMRLoss(encoder, mini_batch_size=2), batch)
    for actual in (plain, cached):
        assert_equal_parts(actual[0], whole[0])
        assert_same_gradients(actual[1], whole[1])


@pytest.mark.parametrize("score_mini_batch_size", [1, 4])
def test_scoring_in_chunks_changes_nothing(encoder, score_mini_batch_size):
    batch = features(encoder)
    expected = loss_and_gradients(MMRLoss(encoder), batch)
    for kind in (MMRLoss, CachedMMRLoss):
        actual = loss_and_gradients(kind(encoder, score_mini_batch_size=score_mini_batch_size), batch)
        assert_equal_parts(actual[0], expected[0])
        assert_same_gradients(actual[1], expected[1])


@pytest.mark.parametrize("mixes_images", [True, False])
def test_the_cached_loss_replays_its_dropout(mixes_images):
    """The second pass draws the masks of the first: the gradient belongs to the loss that was computed."""
    encoder = tiny_encoder(double=True).train()
    encoder[0].model.config.traits.mixes_images = mixes_images
    embedding = encoder[0].model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: dropout(output, 0.5))
    batch, row = features(encoder, count=3), encoder[0].model.config.query_token_ids[0]
    loss = CachedMMRLoss(encoder, mini_batch_size=2, temperature=1.0)

    def value(shift):
        torch.manual_seed(3)
        with torch.no_grad():
            embedding.weight[row, 0] += shift
            total = sum(loss(batch).values())
            embedding.weight[row, 0] -= shift
        return float(total)

    torch.manual_seed(3)
    loss_and_gradients(loss, batch)
    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float(embedding.weight.grad[row, 0]) == pytest.approx(slope, rel=1e-5)


def test_scores_stay_float32_under_autocast():
    encoder = tiny_encoder()
    queries = torch.nn.functional.normalize(torch.randn(4, 4, 32), dim=-1)
    documents = torch.nn.functional.normalize(torch.randn(4, 8, 32), dim=-1)
    loss = MMRLoss(encoder)
    expected = loss.losses(queries, documents, torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss.losses(queries, documents, torch.arange(4))
    assert {name: float(value) for name, value in actual.items()} == {
        name: float(value) for name, value in expected.items()
    }


def test_no_gradients_are_kept_in_evaluation(encoder):
    batch = features(encoder)
    expected, _ = loss_and_gradients(MMRLoss(encoder), batch)
    with torch.no_grad():
        assert_equal_parts(CachedMMRLoss(encoder, mini_batch_size=2)(batch), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mini_batch_size=0), "mini_batch_size must be between"),
        (dict(mini_batch_num_tokens=0), "mini_batch_num_tokens"),
        (dict(score_mini_batch_size=0), "score_mini_batch_size must be between"),
        (dict(temperature=0), "temperature must be above 0"),
        (dict(normalize="max"), "normalize must be"),
        (dict(weights=[1, 1]), "weights must be 3 numbers"),
        (dict(budgets=[(2, 1), (1, 4), (2, 4)]), "not nested"),
        (dict(budgets=[(1, 1), (16, 64)]), "between 1 and 4"),
    ],
)
def test_bad_settings_are_named(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        CachedMMRLoss(encoder, **options)


def test_the_defaults_are_the_papers(encoder):
    for loss in (MMRLoss(encoder), CachedMMRLoss(encoder)):
        settings = loss.settings
        assert (settings.normalize, settings.temperature, settings.weights) == ("sum", 0.03, (1.0, 1.0, 1.0))


def test_the_two_losses_share_frozen_settings(encoder):
    plain, cached = MMRLoss(encoder, score_mini_batch_size=4), CachedMMRLoss(encoder, mini_batch_size=4)
    assert plain.settings == cached.settings
    with pytest.raises(AttributeError):
        plain.settings.temperature = 1.0


def test_a_loss_does_not_change_the_card_of_the_encoder():
    encoder = tiny_encoder()
    encoder.model_card_data, encoder._model_card_text = card, text = object(), "ours"
    MMRLoss(encoder), CachedMMRLoss(encoder)
    assert (encoder.model_card_data, encoder._model_card_text) == (card, text)


def test_the_model_in_place_of_its_encoder_is_named(encoder):
    for kind in (MMRLoss, CachedMMRLoss):
        with pytest.raises(TypeError, match=r"encoder = to_multi_vector_encoder\(model\)"):
            kind(encoder[0].model)
        with pytest.raises(TypeError, match=r"MetaEmbed encoders, got one of NoneType"):
            kind(None)


@pytest.mark.parametrize("lora", [False, True])
def test_training_weights_in_16_bits_warns_with_the_remedy_and_lora_does_not(lora, recwarn):
    encoder = tiny_encoder()
    encoder[0].model.to(torch.bfloat16)
    if lora:
        encoder[0].model.add_adapter(lora_config(encoder[0].model))
    MMRLoss(encoder)
    told = [str(warning.message) for warning in recwarn if "weights to train are bfloat16" in str(warning.message)]
    assert len(told) == (0 if lora else 1)
    assert lora or ("dtype=torch.float32" in told[0] and "bf16=True" in told[0])


def test_too_few_vectors_are_named(encoder):
    batch = [encoder.preprocess(["a"], task="query", num_meta=2), encoder.preprocess(["b"], task="document")]
    with pytest.raises(ValueError, match=r"training at \(4, 8\) needs as many vectors"):
        CachedMMRLoss(encoder)(batch)


def an_encoder_to_train(backbone, adapter):
    encoder = tiny_encoder(double=True)
    if adapter:
        model = encoder[0].model
        model.adapter_base = (str(backbone), None)
        torch.manual_seed(0)
        model.add_adapter(lora_config(model, r=4, lora_dropout=0.0, init_lora_weights=False))
        model.double()
    return encoder.train()


def take_a_step(loss, batches):
    """Take a step down the mean loss of the batches of this process."""
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=0.1)
    (sum(sum(loss(batch).values()) for batch in batches) / len(batches)).backward()
    optimizer.step()


RANK = """
import sys, sentence_transformers, torch, torch.distributed as dist
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = sys.argv[1:3]
from test_losses import BATCH, an_encoder_to_train, features, loss_and_gradients, take_a_step
from tiny_models import tiny_encoder
from metaembed.training.losses import CachedMMRLoss, MMRLoss

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh, folder = dist.get_rank(), init_device_mesh("cpu", (2,)), sys.argv[3]
half = dict(first=rank * BATCH // 2, count=BATCH // 2)

# A whole model on each rank (DDP).
encoder = tiny_encoder(double=True).train()
batch = features(encoder, **half)
# Before 6.2, sentence-transformers' cached losses go backward through DDP with each mini-batch: some have no images.
old = Version(sentence_transformers.__version__) < Version("6.2")
wrapped = DistributedDataParallel(encoder, find_unused_parameters=old)
results = {}
for kind, options in ((MMRLoss, {}), (CachedMMRLoss, dict(mini_batch_size=2))):
    loss = kind(encoder, gather_across_devices=True, **options)
    loss.model = wrapped
    parts, grads = loss_and_gradients(loss, batch)
    results[kind.__name__] = parts, {name.removeprefix("module."): value for name, value in grads.items()}
# The same with the terms of the tokens: the longest document of a rank is not that of the other.
encoder = tiny_encoder(double=True, token_projection=True).train()
batch = features(encoder, **half)
wrapped = DistributedDataParallel(encoder, find_unused_parameters=old)
for kind, options in ((MMRLoss, {}), (CachedMMRLoss, dict(mini_batch_size=2))):
    loss = kind(encoder, gather_across_devices=True, token_terms=True, **options)
    loss.model = wrapped
    parts, grads = loss_and_gradients(loss, batch)
    results["dial", kind.__name__] = parts, {name.removeprefix("module."): value for name, value in grads.items()}
try:
    MMRLoss(encoder, gather_across_devices=True)(features(encoder, count=2 + rank))
except ValueError as error:
    results["unequal"] = str(error)
torch.save(results, f"{folder}/rank{rank}.pt")

# Half of a model on each rank (FSDP2).
for adapter in (False, True):
    encoder = an_encoder_to_train(f"{folder}/backbone", adapter)
    for layer in encoder[0].model.backbone.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    take_a_step(MMRLoss(encoder), [features(encoder, **half)])
    encoder.encode_query(["cat"])  # leaves some weights whole for the moment
    encoder.save_pretrained(f"{folder}/{adapter}")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder with the results of two processes with half a batch each."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_backbone(folder / "backbone")
    (folder / "rank.py").write_text(RANK)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(folder / "rank.py"), str(here), str(here.parent), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
def test_two_ranks_equal_one(encoder, dial, two_ranks, tokens):
    """Under DDP: the mean loss and the gradients of one process with the whole batch."""
    whole = dial if tokens else encoder
    expected = loss_and_gradients(MMRLoss(whole, token_terms=tokens), features(whole))
    ranks = [torch.load(two_ranks / f"rank{rank}.pt") for rank in range(2)]
    for kind in ("MMRLoss", "CachedMMRLoss"):
        kind = ("dial", kind) if tokens else kind
        parts = [rank[kind][0] for rank in ranks]
        assert_equal_parts({name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}, expected[0])
        for rank in ranks:
            assert_same_gradients(rank[kind][1], expected[1])


@pytest.mark.slow
def test_ranks_with_different_numbers_of_documents_are_an_error(two_ranks):
    for rank in range(2):
        assert "as many documents on every rank" in torch.load(two_ranks / f"rank{rank}.pt")["unequal"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_a_sharded_model_is_saved_completely(two_ranks, adapter):
    """Two processes with half the weights each (FSDP2) save the same as one with all of them."""
    encoder = an_encoder_to_train(two_ranks / "backbone", adapter)
    before = encoder[0].model.encode_documents(picture(0))
    take_a_step(MMRLoss(encoder), [features(encoder, first=first, count=BATCH // 2) for first in (0, BATCH // 2)])
    expected = encoder.eval()[0].model.encode_documents(picture(0))
    saved = MetaEmbedModel.from_pretrained(two_ranks / str(adapter), dtype=torch.float64).double()
    torch.testing.assert_close(saved.encode_documents(picture(0)), expected, atol=1e-6, rtol=0)
    assert (expected - before).abs().max() > 1e-3
