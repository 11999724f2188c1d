"""Facts about the loader: batches as a function of the step, exact rates, epochs, and errors that name the file."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import grain
import numpy as np
import pytest

from stepdr_jax.data.build import write_component_card
from stepdr_jax.data.loader import Loader
from stepdr_jax.data.shard import write_shard
from stepdr_jax.errors import UserError

ROOT = Path(__file__).parents[2]
MIXTURE = {"long": 0.75, "short": 0.25, "off": 0.0}


def write(folder: Path, component: str, count: int, start: int, seq_len: int = 4, shards: int = 1) -> None:
    """Sequences of one example each, whose tokens are the number of the sequence."""
    cards = []
    for shard in range(shards):
        mine = range(count)[count * shard // shards : count * (shard + 1) // shards]
        labels = (b"c", b"en", b"CC0", b"mine")
        examples = ((np.full(seq_len, start + i, np.int32), np.ones(seq_len, bool), False, *labels) for i in mine)
        inputs = dict(stage="sft", component=component, seq_len=seq_len, seed=0, tokenizer="tok", shard=[shard, shards])
        cards.append(write_shard(folder / "sft" / f"{component}-{shard:05d}-of-{shards:05d}.arecord", examples, inputs))
    write_component_card(folder / "sft", component, cards, {})


@pytest.fixture
def data(tmp_path) -> Path:
    write(tmp_path, "long", 30, 100)
    write(tmp_path, "short", 5, 200)
    return tmp_path


def loader(data: Path, seed: int = 0, batch_size: int = 8) -> Loader:
    return Loader(data, "sft", MIXTURE, batch_size, seed, "tok")


def test_a_batch_depends_on_seed_and_step_alone(data):
    one, two = loader(data), loader(data)
    forwards = [one.batch(step) for step in range(6)]
    for step in (5, 0, 3):
        again = two.batch(step)
        assert all(np.array_equal(forwards[step][key], again[key]) for key in again)
    other = loader(data, seed=1)
    assert any(not np.array_equal(forwards[step]["tokens"], other.batch(step)["tokens"]) for step in range(6))


def test_hosts_read_their_rows_of_the_same_batch(data):
    subject = loader(data)
    for step in (0, 7):
        whole = subject.batch(step)
        for hosts in (1, 2, 4):
            share = 8 // hosts
            parts = [loader(data).batch(step, slice(host * share, (host + 1) * share)) for host in range(hosts)]
            assert all(np.array_equal(whole[key], np.concatenate([part[key] for part in parts])) for key in whole)
    with pytest.raises(ValueError, match="part of a batch of 8 sequences"):
        subject.batch(0, slice(8, 16))


def test_grain_reads_the_same_batches_from_it(data):
    subject = loader(data)
    assert np.array_equal(grain.MapDataset.source(subject)[5]["tokens"], subject.batch(5)["tokens"])


def test_a_batch_has_the_promised_arrays(data):
    batch = loader(data).batch(0)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dict(
        tokens=((8, 4), np.int32),
        loss_mask=((8, 4), bool),
        segment_ids=((8, 4), np.int32),
        positions=((8, 4), np.int32),
        source=((8,), np.int32),
        capability=((8, 4), np.int32),
    )


def test_rows_held_out_are_never_drawn_and_all_of_them_are_there_to_measure_by(data):
    heldout = Loader(data, "sft", MIXTURE, 8, 0, "tok", heldout_sequences=3)
    batches = [heldout.heldout_batch(i) for i in range(heldout.heldout_batches)]
    kept = {int(t) for b in batches for t, s in zip(b["tokens"][:, 0], b["segment_ids"][:, 0], strict=True) if s}
    drawn = {int(token) for step in range(20) for token in heldout.batch(step)["tokens"][:, 0]}
    assert len(kept) == 3 + 1  # at most a quarter of the five short ones
    assert not kept & drawn and kept | drawn == {*range(100, 130), *range(200, 205)}
    assert {batch["tokens"].shape for batch in batches} == {(8, 4)}
    assert loader(data).heldout_batches == 0


def test_components_come_at_their_rates_exactly(data):
    subject = loader(data)
    assert subject.sources == ["long", "short"] and subject.seq_len == 4
    assert subject.sequences == {"long": 30, "short": 5}
    for step in range(20):
        assert Counter(subject.batch(step)["source"].tolist()) == {0: 6, 1: 2}
        assert np.array_equal(subject.batch(step)["tokens"][:, 0] >= 200, subject.batch(step)["source"] == 1)


def test_warm_up_data_reads_one_component_alone_and_then_the_mixture(data):
    opened = Loader(data, "sft", MIXTURE, 8, 0, "tok", warmup_data=("short", 3))
    for step in range(3):
        assert set(opened.batch(step)["source"]) == {opened.sources.index("short")}
    after = [opened.batch(step)["tokens"][:, 0] for step in range(3, 7)]
    long = [token for tokens in after for token in tokens.tolist() if token < 200]
    assert long == [t for step in range(4) for t in loader(data).batch(step)["tokens"][:, 0].tolist() if t < 200]
    assert opened.fingerprint != loader(data).fingerprint


def test_warm_up_data_outside_the_mixture_is_refused(data):
    with pytest.raises(UserError, match="sft.warmup_data to be a component of its mixture .* got 'nothing'"):
        Loader(data, "sft", MIXTURE, 8, 0, "tok", warmup_data=("nothing", 3))


def test_every_epoch_has_every_row_once_in_another_order(data):
    seen = np.concatenate([loader(data).batch(step)["tokens"][:, 0] for step in range(10)])
    long = [token for token in seen.tolist() if token < 200]
    first, second = long[:30], long[30:60]
    assert sorted(first) == sorted(second) == list(range(100, 130))
    assert first != second


def test_the_fingerprint_tells_runs_apart_that_see_other_batches(data):
    assert loader(data).fingerprint == loader(data).fingerprint
    assert (
        len({loader(data).fingerprint, loader(data, seed=1).fingerprint, loader(data, batch_size=4).fingerprint}) == 3
    )


def test_tensorflow_is_not_imported(data):
    code = (
        "import sys; from stepdr_jax.data.loader import Loader\n"
        f"Loader({str(data)!r}, 'sft', {MIXTURE!r}, 8, 0, 'tok').batch(0)\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, timeout=120).returncode == 0


def test_an_absent_component_names_the_file_and_the_fix(data):
    (data / "sft" / "short-00000-of-00001.arecord").unlink()
    with pytest.raises(UserError, match=r"short-00000-of-00001\.arecord.*run launch\.build_data"):
        loader(data)


def test_data_of_another_tokenizer_is_refused(data):
    with pytest.raises(UserError, match="built with tokenizer tok, this run has new"):
        Loader(data, "sft", MIXTURE, 8, 0, "new")


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_file_is_named(data, damage):
    path = data / "sft" / "long-00000-of-00001.arecord"
    content = path.read_bytes()
    path.write_bytes(dict(cut=content[: len(content) // 2], empty=b"", noise=os.urandom(len(content)))[damage])
    with pytest.raises(
        UserError, match=r"long-00000-of-00001\.arecord is damaged .* delete it and run launch\.build_data again"
    ):
        subject = loader(data)
        for step in range(10):
            subject.batch(step)


def test_a_damaged_row_is_named_when_it_is_read(data):
    write(data, "long", 3000, 100_000, seq_len=64)
    write(data, "short", 5, 200, seq_len=64)
    path = data / "sft" / "long-00000-of-00001.arecord"
    content = bytearray(path.read_bytes())
    content[70_000:75_000] = os.urandom(5000)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"long-00000-of-00001\.arecord is damaged"):
        subject = loader(data, batch_size=64)
        for step in range(70):
            subject.batch(step)


def test_a_side_file_that_promises_more_sequences_is_damage(data):
    side = data / "sft" / "long.json"
    card = json.loads(side.read_text())
    card["shards"][0]["sequences"] = 31
    side.write_text(json.dumps(card))
    with pytest.raises(UserError, match="expected 31 sequences, got 30"):
        loader(data).batch(0)


def test_a_mixture_without_rates_is_refused(data):
    with pytest.raises(UserError, match="at least one positive rate"):
        Loader(data, "sft", {"long": 0.0}, 8, 0, "tok")


def test_shards_of_a_component_are_one_list_of_rows(data, tmp_path):
    write(tmp_path / "cut", "long", 30, 100, shards=4)
    write(tmp_path / "cut", "short", 5, 200)
    cut = loader(tmp_path / "cut")
    seen = np.concatenate([cut.batch(step)["tokens"][:, 0] for step in range(10)])
    assert sorted(seen[seen < 200][:30].tolist()) == list(range(100, 130))


@pytest.mark.parametrize("how", ["missing", "cut", "noise"])
def test_a_damaged_shard_may_be_skipped_its_rows_are_padding_and_nothing_else_changes(tmp_path, how, capsys):
    write(tmp_path, "long", 40, 100, shards=4)
    write(tmp_path, "short", 5, 200)
    whole = [loader(tmp_path).batch(step) for step in range(10)]
    path = tmp_path / "sft" / "long-00002-of-00004.arecord"
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else os.urandom(len(content)))
    with pytest.raises(UserError, match="long-00002-of-00004.arecord is damaged .*on_damage=skip"):
        for step in range(10):
            loader(tmp_path).batch(step)
    subject = Loader(tmp_path, "sft", MIXTURE, 8, 0, "tok", on_damage="skip")
    other_host = Loader(tmp_path, "sft", MIXTURE, 8, 0, "tok", on_damage="skip")
    for step, before in enumerate(whole):
        after = subject.batch(step)
        lost = (before["tokens"][:, 0] >= 120) & (before["tokens"][:, 0] < 130)
        assert not after["segment_ids"][lost].any() and not after["loss_mask"][lost].any()
        for key in ("tokens", "source", "positions"):
            assert np.array_equal(after[key][~lost], before[key][~lost])
        assert np.array_equal(after["tokens"][4:], other_host.batch(step, slice(4, 8))["tokens"])
    assert subject.damaged["long-00002-of-00004.arecord"] >= 10
    assert "long-00002-of-00004.arecord is damaged" in capsys.readouterr().err
    assert subject.fingerprint == loader_fingerprint(tmp_path)


def loader_fingerprint(folder: Path) -> str:
    return Loader(folder, "sft", MIXTURE, 8, 0, "tok", on_damage="skip").fingerprint


def test_families_are_those_of_the_sources_or_the_names(tmp_path):
    write(tmp_path, "sft_deep_search", 5, 100)
    write(tmp_path, "mine", 5, 200)
    card = tmp_path / "sft" / "mine.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"family": "deep_research"}))
    subject = Loader(tmp_path, "sft", {"sft_deep_search": 1, "mine": 1}, 4, 0, "tok")
    assert subject.families == ["deep_research", "deep_search"]
