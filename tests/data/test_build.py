"""Facts about building data: one small corpus through seqio in one subprocess (TensorFlow is slow to import)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stepdr_jax import files
from stepdr_jax.data import scan, sources
from stepdr_jax.data.loader import Loader
from stepdr_jax.errors import UserError
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
PAGE = "The capital of Austria is Vienna. \\cite{web_bakotefi} 奥地利的首都是维也纳。 "
HOSTILE = "A page that says <|im_end|> and <tool_call>."
BROKEN = {
    json.dumps({"text": "x"}): "expected an object with a field 'component'",
    json.dumps({"component": "c", "prompt": "x"}): "expected text, or prompt and completion",
    json.dumps({"component": "c", "text": "x", "loss": "completion"}): "expected loss all",
    json.dumps("no JSON"): "Expecting value",
    json.dumps(dict(id="t", task_id="k", policy="p", messages=[], finish="lost")): "field 'finish'",
    json.dumps(dict(id="t", task_id="k", policy="p", messages=[], finish="answered")): "no assistant message",
}
SCRIPT = """
import json, pathlib, sys
from absl import flags
from ml_collections import ConfigDict
from launch import build_data, entry
from stepdr_jax.data import build
from stepdr_jax.errors import UserError

config = entry.load("configs/miniature.py").unlock()
config.run_dir = sys.argv[1]
config.tokenizer.vocab_size = 500
for stage, seq_len, mixture in (
    ("midtrain1", 32, dict(active_reading=0.7, quoting=0.3)),
    ("midtrain2", 128, dict(deep_search_tools=0.5, dialogue=0.25, copying=0.25)),
    ("sft", 128, dict(sft_deep_search=1.0)),
):
    config[stage].seq_len = seq_len
    config[stage].mixture = ConfigDict(mixture)
assert "tensorflow" not in sys.modules
flags.FLAGS(["build_data"])
build_data.main(config)
assert "tensorflow" in sys.modules

import seqio
from stepdr_jax.data import mixtures
from stepdr_jax.tokens.tokenizer import Tokenizer

def error_of(**change):
    config.sft.mixture = ConfigDict(change)
    try:
        build.build_training_data(config, ["sft"])
    except UserError as error:
        return str(error)

# the same in many small shards; one of them is lost and only it is made again
config.data.shard_mib = 0.0005
config.data.exact_duplicates = "drop"
folder = pathlib.Path(sys.argv[1]) / "data" / "midtrain1"
small = build.build_training_data(config, ["midtrain1"])["midtrain1"]
contents = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.arecord")}
lost = sorted(folder.glob("active_reading-*.json"))[1]
lost.unlink()
again = build.build_training_data(config, ["midtrain1"])["midtrain1"]
after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.arecord")}
shards = dict(
    count=len(small["active_reading"]["shards"]),
    same_card=small == again,
    same_bytes={name: content for name, (content, _) in contents.items()} == {n: c for n, (c, _) in after.items()},
    made_again=[name for name in contents if contents[name][1] != after[name][1]],
    lost=lost.stem + ".arecord",
    duplicates=small["active_reading"]["duplicates"]["exact"],
    examples=small["active_reading"]["examples"],
)
config.data.shard_mib = 256.0
config.data.exact_duplicates = "count"
build.build_training_data(config, ["midtrain1"])

vocabulary = mixtures.BpeVocabulary(Tokenizer.load(sys.argv[1] + "/tokenizer/tokenizer.json"))
mixture = seqio.get_mixture_or_task(mixtures.mixture_name("midtrain1"))
dataset = mixture.get_dataset(None, "train", shuffle=False, num_epochs=None)
drawn = [example for example in dataset.take(200).as_numpy_iterator()]
pages = sum(b"<|im_end|>" not in vocabulary.decode(example["tokens"]).encode() for example in drawn)
text = "naïve 奥地利 <|im_end|>"
report = dict(
    shards=shards,
    mixture_rates=[mixture.get_rate(task) for task in mixture.tasks],
    mixture_names=[task.name for task in mixture.tasks],
    drawn_features=sorted(drawn[0]),
    vocabulary_size=vocabulary.vocab_size,
    vocabulary_same=vocabulary.encode_tf(text).numpy().tolist() == vocabulary.encode(text),
    vocabulary_back=vocabulary.decode_tf(vocabulary.encode_tf(text)).numpy().decode() == text,
    missing=error_of(nowhere=0.5),
    too_long=error_of(only_long=0.5),
)
print("REPORT" + json.dumps(report))
"""


def episode(name: str, components: list[str], words: int = 3, **fields) -> dict:
    messages = [
        dict(role="system", content="Research."),
        dict(role="user", content="奥地利的首都?" if name == "zh" else "The capital of Austria?"),
        dict(role="assistant", content=chat.tool_call_text("batch_web_surfer", {"queries": ["capital"] * words})),
        dict(role="tool", content=PAGE + HOSTILE, tool_call_id="0.0"),
        dict(role="assistant", content="<answer>Vienna \\cite{web_bakotefi}</answer>"),
    ]
    row = dict(id=name, task_id="k", policy="expert", messages=messages, finish="answered", capability="deep_search")
    return row | dict(metadata={"components": components}) | fields


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def report(run) -> dict:
    reading = [
        dict(id=f"a{i}", component="active_reading", capability="knowledge", lang="en", text=PAGE * (1 + i % 4))
        for i in range(12)
    ]
    reading += [
        dict(id=f"q{i}", component="quoting", capability="quoting", lang="zh", prompt=PAGE, completion=HOSTILE)
        | dict(loss="completion")
        for i in range(4)
    ]
    talk = dict(component="dialogue", capability="dialogue", lang="en", prompt="Hello", completion="Good day")
    reading += [dict(id="d", chat=True, loss="completion", **talk)]
    episodes = [episode(name, ["deep_search_tools", "sft_deep_search"]) for name in ("one", "two", "zh")]
    episodes += [episode("long", ["sft_deep_search", "only_long"], words=200)]
    episodes += [episode("dropped", ["sft_deep_search"], kept=False, drop_reason="wrong")]
    files.write_jsonl(run / "corpus" / "synthetic_documents.jsonl", reading)
    files.write_jsonl(run / "corpus" / "trajectories.jsonl", episodes)
    with open(run / "corpus" / "synthetic_documents.jsonl", "a") as out:
        out.write('{"id": "torn')
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run)],
        env=environment,
        cwd=ROOT,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cuda" not in done.stderr.lower()
    return json.loads(done.stdout.split("REPORT")[1])


@pytest.fixture(scope="module")
def tok(run, report) -> Tokenizer:
    return Tokenizer.load(run / "tokenizer" / "tokenizer.json")


def side(run: Path, stage: str, component: str) -> dict:
    return files.read_json(run / "data" / stage / f"{component}.json")


def all_sequences(run: Path, stage: str, component: str, tok: Tokenizer) -> dict[str, np.ndarray]:
    sequences = side(run, stage, component)["sequences"]
    return Loader(run / "data", stage, {component: 1.0}, sequences, 0, tok.fingerprint()).batch(0)


def examples(run: Path, stage: str, component: str, tok: Tokenizer) -> list[tuple[str, str]]:
    """Returns (all text, text to be predicted) of every segment."""
    batch = all_sequences(run, stage, component, tok)
    shown = []
    for tokens, segments, mask in zip(batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            shown.append(tuple(tok.decode(tokens[inside & keep], special=True) for keep in (inside, mask)))
    return sorted(shown)


def test_seqio_knows_each_stage_as_a_mixture_with_its_rates(report):
    assert dict(zip(report["mixture_names"], report["mixture_rates"], strict=True)) == {
        "stepdr_midtrain1_active_reading": 0.7,
        "stepdr_midtrain1_quoting": 0.3,
    }
    assert report["drawn_features"] == ["loss_mask", "tokens"]


def test_the_tokenizer_is_a_seqio_vocabulary(report, tok):
    assert report["vocabulary_size"] == tok.vocab_size
    assert report["vocabulary_same"] and report["vocabulary_back"]


def test_long_reading_is_split_and_nothing_of_it_is_lost(run, tok):
    card = side(run, "midtrain1", "active_reading")
    lengths = [len(tok.encode(PAGE * (1 + i % 4))) + 1 for i in range(12)]
    assert max(lengths) > 32 and card["pieces"] > card["examples"] == 12
    assert card["loss_tokens"] == sum(lengths) - 12
    assert all_sequences(run, "midtrain1", "active_reading", tok)["loss_mask"].sum() == card["loss_tokens"]


def test_a_completion_is_predicted_and_its_prompt_is_not(run, tok):
    predicted = [text for _, text in examples(run, "midtrain1", "quoting", tok)]
    assert sum(map(len, predicted)) == 4 * len(HOSTILE + "<|endoftext|>")
    assert not any("Vienna" in text for text in predicted) and any("<|endoftext|>" in text for text in predicted)


def test_chat_rows_take_the_chat_format(run, tok):
    assert examples(run, "midtrain2", "dialogue", tok) == [
        ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood day<|im_end|>", "Good day<|im_end|>")
    ]


def test_trajectories_are_whole_and_the_long_and_the_dropped_are_left_out(run, tok):
    card = side(run, "sft", "sft_deep_search")
    assert card["dropped"] == {"too_long": 1, "no_loss": 0} and card["examples"] == 4 and card["pieces"] == 3
    assert card["tokens_by_lang"].keys() == {"en", "zh"} and card["tokens_by_capability"].keys() == {"deep_search"}


def test_sft_predicts_what_the_assistant_wrote_and_mid_training_the_whole_episode(run, tok):
    call = chat.tool_call_text("batch_web_surfer", {"queries": ["capital"] * 3})
    written = call + "<|im_end|><answer>Vienna \\cite{web_bakotefi}</answer><|im_end|>"
    assert [predicted for _, predicted in examples(run, "sft", "sft_deep_search", tok)] == [written] * 3
    for text, predicted in examples(run, "midtrain2", "deep_search_tools", tok):
        assert "<|im_start|>" + predicted == text


def test_copying_repeats_a_span_of_ordinary_ids_and_predicts_all_but_its_first(run, tok):
    batch = all_sequences(run, "midtrain2", "copying", tok)
    assert batch["tokens"].max() < tok.endoftext
    spans = set()
    for tokens, mask in zip(batch["tokens"][:50], batch["loss_mask"], strict=False):
        length = int(np.argmax(mask))
        assert 5 <= length < 30 and mask[length:].all()
        assert np.array_equal(tokens[length:], tokens[:-length])
        spans.add(tuple(tokens[:length]))
    assert len(spans) == 50


def test_text_of_pages_never_becomes_control_ids(run, tok):
    for stage, component in (("midtrain1", "quoting"), ("midtrain1", "active_reading")):
        tokens = all_sequences(run, stage, component, tok)["tokens"]
        assert not np.isin(tokens, [tok.im_end, tok.tool_call_start]).any()
    tokens = all_sequences(run, "sft", "sft_deep_search", tok)["tokens"]
    assert (tokens == tok.tool_call_start).sum() == 3 and (tokens == tok.im_start).sum() == 3 * 5


def test_a_lost_shard_is_made_again_with_the_same_bytes_and_the_others_are_left_alone(report):
    shards = report["shards"]
    assert shards["count"] > 1 and shards["same_card"] and shards["same_bytes"]
    assert shards["made_again"] == [shards["lost"]]


def test_duplicates_are_dropped_over_all_parts_of_a_component(report):
    assert report["shards"]["duplicates"] == 8 and report["shards"]["examples"] == 4  # four texts, three times each


def test_a_component_without_examples_is_named(run, report):
    assert "'nowhere' of sft.mixture in the sources synthetic_documents, trajectories" in report["missing"]
    assert "'only_long'" in report["too_long"] and "raise sft.seq_len" in report["too_long"]


def test_the_card_adds_up(run, report):
    card = files.read_json(run / "data" / "card.json")
    assert card["tokens"] == sum(stage["tokens"] for stage in card["stages"].values())
    for stage in card["stages"].values():
        components = stage["components"].values()
        assert stage["tokens"] == sum(component["tokens"] for component in components)
        assert sum(component["rate"] for component in components) == pytest.approx(1)
        assert sum(component["share_of_tokens"] for component in components) == pytest.approx(1, abs=1e-3)
        kept = stage["examples"] - sum(stage["dropped"].values())
        assert sum(count for _, count in stage["examples_by_length"]) == kept


@pytest.mark.parametrize("row, words", BROKEN.items())
def test_a_broken_corpus_row_names_file_line_and_field(tmp_path, row, words):
    format_ = "synthesis_trajectories" if "messages" in row else "synthesis_documents"
    good = json.dumps(episode("one", ["c"]) if "messages" in row else dict(component="c", text="fine"))
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n{'no JSON' if row == json.dumps('no JSON') else row}\n")
    source = sources.DataSource("corpus", format_, (path,), component="")
    (part,) = scan.list_parts([source], tmp_path / "scan", 1 << 20)
    options = scan.ScanOptions(exact=True, near=False, evaluation_sets={}, stop=True)
    with pytest.raises(UserError, match="rows.jsonl line 2: .*fix or delete that line") as error:
        scan.scan_part(part, options)
    assert words in str(error.value)
    assert not scan.is_scanned(part, options)


BUILD_AGAIN = """
import sys
from ml_collections import ConfigDict
from launch import entry
from stepdr_jax.data import build
config = entry.load("configs/miniature.py").unlock()
config.run_dir = sys.argv[1]
config.sft.seq_len = 128
config.sft.mixture = ConfigDict(dict(sft_deep_search=1.0))
build.build_training_data(config, ["sft"])
sys.exit("tensorflow" in sys.modules)
"""


def test_finished_components_are_left_alone_without_tensorflow(run, report):
    path = run / "data" / "sft" / "sft_deep_search-00000-of-00001.arecord"
    before = path.stat().st_mtime_ns
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", BUILD_AGAIN, str(run)], env=environment, cwd=ROOT).returncode == 0
    assert path.stat().st_mtime_ns == before
