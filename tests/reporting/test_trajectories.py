"""The trajectory page: what it packs, what it leaves out, and how it behaves in a real browser with hostile text."""

import base64
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from stepdr_jax import records
from stepdr_jax.errors import UserError
from stepdr_jax.judge.scored import Scored
from stepdr_jax.records import Judgment, RubricSet
from stepdr_jax.reporting import trajectories
from stepdr_jax.rl import recordings, rollouts
from stepdr_jax.rl.learner import Details
from stepdr_jax.rl.rollouts import Rollout
from stepdr_jax.tokens.log import TokenLog
from stepdr_jax.tokens.tokenizer import Tokenizer
from tests.reporting import synthetic_run

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
ATTACK = "<script>window.attacked=1</script><img src=x onerror=window.attacked=1>\u202e</div>"
SPOKEN = f"<think>奥地利 🜚 {ATTACK}</think>\n<answer>维也纳\\cite{{web_bakotefi}}</answer>"


def episodes_of(iteration: int, tasks, tokenizer) -> list[Rollout]:
    """Eight made-up episodes: one masked by broken tools, one with a judgment that failed, all with hostile text."""
    out = []
    noise = np.random.default_rng(iteration)
    for index, task in enumerate(tasks[:8]):
        masked = index == 5
        trajectory, verdict = (
            synthetic_run.failed_episode(task) if masked else synthetic_run.make_episode(task, index % 2 == 0)
        )
        trajectory.messages[-2].content += ATTACK
        trajectory.messages[-1].content = SPOKEN
        if index == 6:
            verdict.judgments[1] = Judgment(
                rid="b", weight=2, role="implicit", verdict="error", score=None, reason=ATTACK
            )
        log = TokenLog()
        log.observed(tokenizer.encode(trajectory.messages[1].content))
        for text, given in (("<tool_call>搜索", trajectory.messages[-2].content), (SPOKEN, None)):
            ids = tokenizer.encode(text)
            log.sampled(ids, -noise.random(len(ids)), iteration)
            if given:
                log.observed(tokenizer.encode(given))
        scored = Scored(None, None, "infra_failed") if masked else Scored(verdict.reward, verdict)
        out.append(Rollout(index, task, 7, trajectory, log, scored))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("run")
    tasks = synthetic_run.write_corpus(home)
    tokenizer = Tokenizer.load(home / "tokenizer" / "tokenizer.json")
    directory = home / "seed0" / "ppo" / "iterations"
    for iteration in range(3):
        episodes = episodes_of(iteration, tasks, tokenizer)
        recordings.save_rollouts(directory, iteration, episodes, "mark")
        batch = rollouts.rollout_arrays(episodes, 2048)
        noise = np.random.default_rng(100 + iteration)
        values, advantages = noise.normal(size=(2, *batch.tokens_ET.shape))
        recordings.add_details(
            directory, iteration, episodes, batch, Details(values, advantages, batch.logprobs_ET + 1e-4)
        )
    return home


def write(run: Path, out: Path, iterations=(0, 1, 2), **settings) -> tuple[dict, str]:
    tasks = {task.id: task for task in records.read_records(run / "corpus" / "tasks.jsonl", records.Task)}
    rubrics = {row.task_id: row for row in records.read_records(run / "corpus" / "rubrics.jsonl", RubricSet)}
    counts = trajectories.write_trajectories_page(
        run / "seed0" / "ppo" / "iterations",
        out,
        iterations=iterations,
        tokenizer=Tokenizer.load(run / "tokenizer" / "tokenizer.json"),
        tasks=tasks,
        rubrics=rubrics,
        title="t",
        seed=0,
        **settings,
    )
    return counts, out.read_text()


def unpacked(page: str, name: str):
    text = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', page)[1]
    return json.loads(zlib.decompress(base64.b64decode(text), -zlib.MAX_WBITS))


def test_every_episode_is_listed_and_unpacks_to_what_was_recorded(run, tmp_path):
    counts, page = write(run, tmp_path / "t.html")
    rows = unpacked(page, "episode-data")
    assert counts == {"episodes": 24, "shown": 24, "bytes": len(page.encode())}
    assert [row["link"] for row in rows] == [f"0-{i}-{n}" for i in range(3) for n in range(8)]
    assert [row["masked"] for row in rows if "masked" in row] == ["infra_failed"] * 3
    assert sum(row.get("detailed", False) for row in rows) == 3 * recordings.DETAILED_EPISODES
    assert all(row["gap"] == pytest.approx(1e-4, rel=0.01) for row in rows if row.get("detailed"))
    for row in rows[:8]:
        body = unpacked(page, f"block-{row['block']}")[row["at"]]
        _, held = recordings.read_recording(run / "seed0" / "ppo" / "iterations", 0)
        log = held[row["index"]][1]
        assert body["tokens"]["ids"] == log["tokens"][: len(body["tokens"]["ids"])].tolist()
        assert body["tokens"]["sampler"] == pytest.approx(log["logprobs"][log["sampled"]].tolist(), abs=1e-6)
        assert body["steps"] and body["index"] == row["index"]


def test_a_small_page_keeps_some_of_every_iteration_those_with_values_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "BLOCK_BYTES", 1)
    counts, page = write(run, tmp_path / "t.html", max_bytes=12_000)
    rows = unpacked(page, "episode-data")
    assert 3 <= counts["shown"] == len(rows) < 24
    assert {row["iteration"] for row in rows} == {0, 1, 2} and all(row.get("detailed") for row in rows)
    assert f"{24 - len(rows)} more were omitted" in page


def test_text_of_episodes_is_nowhere_in_the_page(run, tmp_path):
    _, page = write(run, tmp_path / "t.html")
    assert "window.attacked" not in page and "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"?http|url\(|@import", page)


def test_iterations_are_chosen_by_number_and_range(run, tmp_path):
    directory = run / "seed0" / "ppo" / "iterations"
    assert trajectories.select_iterations(directory) == [0, 1, 2]
    assert trajectories.select_iterations(directory, "2,0-1") == [0, 1, 2]
    with pytest.raises(UserError, match="iteration 7 is not in"):
        trajectories.select_iterations(directory, "7")
    with pytest.raises(UserError, match="expected iterations such as"):
        trajectories.select_iterations(directory, "last")
    with pytest.raises(UserError, match="found none"):
        trajectories.select_iterations(tmp_path)


def test_an_iteration_alone_without_corpus_and_token_logs(run, tmp_path):
    home = tmp_path / "seed0" / "ppo" / "iterations"
    home.mkdir(parents=True)
    shutil.copy(run / "seed0" / "ppo" / "iterations" / "0001.jsonl", home)
    command = [sys.executable, "-m", "launch.trajectories", f"--iterations={home}"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 2 and "--tokenizer" in told.stderr
    command.append(f"--tokenizer={run / 'tokenizer' / 'tokenizer.json'}")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = unpacked((home.parent / "trajectories.html").read_text(), "episode-data")
    assert len(rows) == 8 and sum(row.get("detailed", False) for row in rows) == recordings.DETAILED_EPISODES


def test_files_that_are_no_recordings_are_named(run, tmp_path):
    home = tmp_path / "seed0" / "ppo" / "iterations"
    shutil.copytree(run / "seed0" / "ppo" / "iterations", home)
    shutil.copytree(run / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(run / "corpus", tmp_path / "corpus")
    (home / "0000.npz").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"0000\.npz is damaged"):
        write(tmp_path, tmp_path / "t.html")
    (home / "0000.npz").unlink()
    (home / "0000.jsonl").write_text('{"reward": 1}\n')
    with pytest.raises(UserError, match=r"0000\.jsonl row 1: expected a recorded episode"):
        write(tmp_path, tmp_path / "t.html")
    assert not (tmp_path / "t.html").exists()


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install .[browser])")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH (apt-get install chromium)")
    with sync.sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield program
        program.close()


CONTRAST = """() => {
  const paint = (colour) => { const c = document.createElement("canvas").getContext("2d"); c.fillStyle = colour; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]; };
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] / 255 + b[i] * (1 - a[3] / 255));
  const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const card = paint(getComputedStyle(document.querySelector(".viewer")).backgroundColor);
  let least = 99;
  for (const name of ["", "below", "rare"]) {
    const span = document.querySelector(".turn").appendChild(document.createElement("span"));
    span.className = name; span.style.setProperty("--k", "1");
    const style = getComputedStyle(span), a = light(over(paint(style.backgroundColor), card)), b = light(paint(style.color));
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
    span.remove();
  }
  return least;
}"""


@pytest.mark.browser
def test_the_page_in_a_browser(run, browser, tmp_path):
    _, page = write(run, tmp_path / "t.html")
    tokenizer = Tokenizer.load(run / "tokenizer" / "tokenizer.json")
    opened = browser.new_page()
    problems, requests = [], []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("request", lambda request: requests.append(request.url))
    address = (tmp_path / "t.html").as_uri()

    # a link opens its episode; hostile text is text
    opened.goto(address + "#episode=0-1-6")
    opened.wait_for_selector(".tokens")
    assert opened.eval_on_selector('.list [aria-current="true"]', "b => b.textContent").count("Landia6")
    assert "<script>window.attacked=1</script>" in opened.inner_text(".tokens")
    assert "\u202e" not in opened.inner_text(".tokens") and "⟨U+202E⟩" in opened.inner_text(".tokens")
    assert "judge failed" in opened.inner_text(".rubrics") and "<img" in opened.inner_text(".rubrics")
    opened.keyboard.press("t")
    assert ATTACK[:20] in opened.inner_text(".detail")
    opened.keyboard.press("t")
    assert opened.evaluate("[window.attacked ?? null, document.querySelectorAll('img, .detail script').length]") == [
        None,
        0,
    ]

    # what stands in tokens that are not whole characters is put together as the tokenizer does it
    broken = tokenizer.encode("奥🜚")[:-1] + tokenizer.encode("ab利") + tokenizer.encode("利")[1:]
    for ids in (tokenizer.encode(SPOKEN), broken):
        known = json.loads(json.dumps({str(i): (list(tokenizer.piece(i))) for i in ids}))
        texts = opened.evaluate("([ids, known]) => tokenTexts(ids, known)", [ids, known])
        assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    sampled = "".join(opened.locator(".turn").nth(1).locator("span").all_inner_texts())
    assert "维" in sampled and "\ufffd" not in sampled

    # the next one has values: every sampled token tells its numbers, by keyboard too
    opened.keyboard.press("n")
    opened.wait_for_function("location.hash === '#episode=0-1-7'")
    opened.focus(".tokens")
    for key in ("Home", "ArrowRight", "ArrowDown"):
        opened.keyboard.press(key)
    said = opened.inner_text(".token-tip")
    for name in ("id ", "turn", "advantage", "value", "log-prob, sampler", "log-prob, trainer", "gap", "version 1"):
        assert name in said
    block = next(row for row in unpacked(page, "block-1") if row["index"] == 7)
    assert opened.locator(".turn span").count() == len(block["tokens"]["sampler"])
    assert opened.locator(".given span").count() == 0

    # order, filters and colours
    opened.keyboard.press("Escape")
    opened.select_option("select[name=order]", "-reward")
    rewards = [row.get("reward") for row in unpacked(page, "episode-data")]
    first = opened.locator(".list li").first.inner_text()
    assert f"· {max(filter(None, rewards)):g}" in first and "masked" in opened.locator(".list li").last.inner_text()
    opened.fill("input[type=search]", "landia3")
    assert opened.inner_text(".count") == "3 of 24 episodes"
    opened.fill("input[type=search]", "")
    opened.select_option("select[name=masked]", "infra_failed")
    opened.wait_for_function("document.querySelector('.count').textContent.startsWith('3 of 24')")
    assert "weight 0 in every loss" in opened.inner_text("p.masked") and "UNAVAILABLE" in opened.inner_text("p.masked")
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        assert opened.evaluate(CONTRAST) >= 4.5
    assert problems == [] and requests == [address]
