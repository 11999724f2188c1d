"""The estimate's formulas against numbers worked out by hand."""

import pytest

from stepdr_jax.aot import roofline
from stepdr_jax.models.sizes import SIZES, parameter_count
from stepdr_jax.sharding import topology

MODEL = SIZES["32B"]
TOKENS = 131072
STEP = dict(seq_len=TOKENS, batch_size=8, remat="layer", strategy="ring", shards=16, zigzag=True)
V5P = topology.parse("v5p:4x4x8")
FREE = roofline.Work(0.0, 0.0, 0.0, 0.0)


def test_parameters_of_the_layers_are_those_of_the_model():
    kernels = 64 * roofline.layer_parameters(MODEL)
    biases_and_norms = 64 * (2 * 5120 + 5120 + 2 * 1024) + 5120
    assert kernels + biases_and_norms == parameter_count(MODEL, embeddings=False)


def test_model_flops_of_32b_at_128k():
    work = roofline.work_of(MODEL, **STEP)
    without_embedding = 32.764e9 - 152064 * 5120
    assert work.model_products == pytest.approx(6 * without_embedding * 8 * TOKENS, rel=1e-3)
    assert work.model_attention == pytest.approx(6 * 40 * 128 * TOKENS**2 * 64 * 8, rel=1e-4)  # causal: half of 12
    assert work.model / 128 == pytest.approx(3.68e15, rel=5e-3)


def test_recomputation_adds_to_what_is_done_and_not_to_the_model():
    work = {remat: roofline.work_of(MODEL, **STEP | dict(remat=remat)) for remat in ("none", "attention", "layer")}
    assert len({w.model for w in work.values()}) == 1
    assert work["none"].done_products < work["attention"].done_products == work["layer"].done_products
    assert work["none"].done_attention == work["attention"].done_attention < work["layer"].done_attention


def test_a_contiguous_ring_does_almost_twice_the_attention_of_a_zigzag_one():
    plain, zigzag = (roofline.work_of(MODEL, **STEP | dict(zigzag=z)).done_attention for z in (False, True))
    assert plain / zigzag == pytest.approx(31 / 16, rel=1e-3)


def transfer(**changes):
    base = dict(kind="all-gather", axes=["context"], group=16, bytes=180e9, times=1, hidden=False)
    return base | changes


@pytest.mark.parametrize(
    ("change", "seconds"),
    [
        (dict(), 15 / 16),  # 180 GB over a ring of 90 GB/s both ways
        (dict(kind="reduce-scatter"), 15 / 16),
        (dict(kind="all-reduce"), 30 / 16),
        (dict(kind="collective-permute"), 2.0),  # one link, one way
        (dict(kind="all-to-all"), 4.0),  # a quarter of the ring on average
    ],
)
def test_seconds_of_a_transfer_on_a_v5p_ring(change, seconds):
    assert roofline.seconds_of(transfer(**change), V5P) == pytest.approx(seconds)


def test_a_slice_that_does_not_wrap_is_half_as_fast():
    assert roofline.seconds_of(transfer(), topology.parse("v5p:2x4x4")) == pytest.approx(15 / 8)


def test_between_slices_the_slower_network_counts():
    two = topology.parse("2xv5p:8x8x8")
    t = transfer(kind="all-reduce", axes=["data"], group=2, bytes=6.25e9)
    assert roofline.seconds_of(t, two) == pytest.approx(1.0)


def test_hidden_transfers_cost_nothing_until_they_outlast_the_arithmetic():
    work = roofline.Work(0.0, 0.0, 459e12 * roofline.PRODUCTS * 128, 0.0)  # one second
    step = lambda times: roofline.estimate(work, 0.0, [transfer(hidden=True, times=times)], V5P, tokens=1280)  # noqa: E731
    assert step(1)["seconds"]["step"] == pytest.approx(1.0)
    assert step(1)["tokens_per_second_per_chip"] == pytest.approx(10.0)
    assert step(4)["seconds"]["step"] == pytest.approx(4 * 15 / 16)
    assert (step(1)["bound"], step(4)["bound"]) == ("arithmetic", "hidden transfers")


def test_exposed_transfers_add_to_the_step():
    work = roofline.Work(459e12 * 128, 0.0, 459e12 * roofline.PRODUCTS * 128, 0.0)
    made = roofline.estimate(work, 0.0, [transfer(times=8)], V5P, tokens=1)
    assert made["seconds"]["step"] == pytest.approx(1.0 + 7.5)
    assert made["bound"] == "exposed transfers"
    assert made["mfu"] == pytest.approx(1 / 8.5)


def test_the_estimate_says_that_it_is_one():
    made = roofline.estimate(FREE, 2765e9, [], V5P, tokens=1)
    assert "not measured" in made["label"] and len(made["assumptions"]) >= 4
    assert made["seconds"]["step"] == pytest.approx(1.0) and made["bound"] == "HBM"
