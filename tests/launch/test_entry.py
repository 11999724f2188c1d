"""Mistyped input gets a one-line message that says how to fix it; correct input reaches the script."""

import errno
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from launch import entry
from stepdr_jax.errors import UserError


def parse(*words, **kwargs):
    return entry.parse(["launch/quickstart.py", *words], "Doc.", **kwargs)


def test_the_default_config_is_the_miniature_and_is_locked():
    config = parse()
    assert config.name == "miniature" and config.is_locked


def test_fields_are_changed_by_their_type():
    config = parse(
        "--config.seed=3",
        "--config.ppo.clip=1",
        "--config.offline_web.as_of=2026-01-05",
        "--config.model.tie_embeddings=false",
        "--config.synthesis.seed_degree=(1,2)",
        "--config.sft.mixture.sft_deep_search=1.0",
    )
    assert config.seed == 3 and config.ppo.clip == 1.0 and config.offline_web.as_of == "2026-01-05"
    assert config.model.tie_embeddings is False and config.synthesis.seed_degree == (1, 2)
    assert config.sft.mixture.sft_deep_search == 1.0
    assert entry.config_arguments()[0] == "--config.seed=3"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.sed=3", "did you mean seed"),
        ("--config.ppo.sample_per_promt=3", "did you mean ppo.samples_per_prompt"),
        ("--config.actor_learning_rate=3", "did you mean ppo.actor_learning_rate"),
        ("--config.seed.x=3", "seed has no field 'x'"),
        ("--config.seed=abc", "config.seed: expected an integer .now 0., got 'abc'"),
        ("--config.seed", "expected --config.seed=VALUE"),
        ("--config.ppo=3", "config.ppo: expected one of its fields"),
        ("--config.model.tie_embeddings=maybe", "expected true or false"),
        ("--config.ppo.clip=-1", "ppo.clip: expected a number above 0"),
        ("--config.ppo.clip=nan", "ppo.clip: expected a number above 0"),
        ("--config.ppo.gamma=2", "ppo.gamma: expected a share between 0 and 1"),
        ("--config.model.num_kv_heads=3", "model.num_kv_heads: expected a divisor of model.num_heads 2"),
        ("--config.sft.microbatches=5", "sft.microbatches: expected a divisor"),
        ("--config.agent.prompt=long", "agent.prompt: expected one of compact, full"),
        ("--config.offline_web.as_of=yesterday", "offline_web.as_of: expected a date"),
        ("--config.synthesis.seed_degree=10,3", "synthesis.seed_degree: expected .low, high."),
        ("--config.run_dir=", "run_dir: expected a folder"),
        ("--config=configs/miniatur.py", "does not exist; did you mean configs/miniature.py"),
        ("--config=configs/ppo_presets.py", "has no get_config.*as configs/ppo_orz_paper.py"),
        ("--config=configs", "is a folder; give a Python file, or the config.json of a run"),
        ("--config=config/miniature.py", "does not exist; did you mean .*configs/miniature.py"),
        ("--cofnig=x", "unknown flag --cofnig; did you mean --config"),
        ("miniature", "expected only flags, got 'miniature'"),
    ],
)
def test_mistakes_are_named_with_their_fix(word, message):
    with pytest.raises(UserError, match=message):
        parse(word)


def test_a_config_file_of_ones_own_must_have_the_declared_fields(tmp_path):
    path = tmp_path / "mine.py"
    body = (
        "from configs import miniature\ndef get_config():\n  config = miniature.get_config(){}\n  {}\n  return config\n"
    )
    path.write_text(body.format("", "config.name = 'mine'"))
    config = parse(f"--config={path}")
    assert config.name == "mine" and config.config_file == str(path)
    for change, message in [
        ("del config.ppo.clip", "lacks ppo.clip"),
        ("config.ppo.clipp = 1.0", "unknown field ppo.clipp; did you mean ppo.clip"),
        ("config.ppo.update(dict(clipp=1.0))", f"config file {path} has an unknown field ppo.clipp"),
        ("del config.ppo; config.ppo = 3", "ppo: expected a section"),
        ("del config.seed; config.seed = 'x'", "seed: expected an integer, got 'x'"),
        ("1 / 0", "does not load: ZeroDivisionError"),
    ]:
        path.write_text(body.format(".unlock()", change))
        with pytest.raises(UserError, match=message):
            parse(f"--config={path}")
    for change in ("config.ppo.clipp = 1.0", "config.ppo.update(dict(clipp=1.0))"):
        path.write_text(body.format("", change))
        with pytest.raises(UserError, match=f"config file {path}: there is no field 'clipp'; did you mean ppo.clip"):
            parse(f"--config={path}")
    path.write_text("def get_config(): return {}")
    with pytest.raises(UserError, match="expected get_config.. to return a ConfigDict, got dict"):
        parse(f"--config={path}")
    path.write_text("x = (")
    with pytest.raises(UserError, match="does not load: SyntaxError"):
        parse(f"--config={path}")


def test_words_are_arguments_only_where_a_script_takes_them():
    parse("Which neighbours?", "--config.seed=1", positional="QUESTION")
    assert entry.arguments() == ["Which neighbours?"]


def test_help_shows_the_docstring_and_how_to_change_a_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Doc.") and "--config.FIELD=VALUE" in text
    assert "example: python -m launch.quickstart --config=configs/miniature.py --config." in text


def raising(error):
    def work():
        raise error

    return work


class ToolHostError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("expected x, got y;\n do z"), 2, "error: expected x, got y; do z"),
        (ToolHostError("port 80 is in use"), 2, "error: port 80 is in use"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), 2, "disk full while writing a/b; free space and run the same"),
        (ValueError("INTERNAL: write: No space left on device"), 2, "disk full; free space and run the same"),
        (PermissionError(errno.EACCES, "denied", "a/b"), 2, "a/b: permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, "a/b: Not a directory; check this path"),
        (
            OSError(errno.ESTALE, "Stale file handle", "a/b"),
            2,
            "the storage of a/b failed (Stale file handle); when it is",
        ),
        (KeyboardInterrupt(), 130, "interrupted; run the same command to continue"),
    ],
)
def test_what_a_person_can_fix_is_one_line_and_a_status(error, status, line, capsys):
    assert entry.guarded(raising(error)) == status
    text = capsys.readouterr().err
    assert line in text and text.count("\n") == 1


def test_a_user_error_inside_another_exception_is_still_one_line(capsys):
    def work():
        try:
            raise UserError("run_dir is not writable; choose another")
        except UserError as error:
            raise ExceptionGroup("unhandled errors in a TaskGroup", [error]) from error

    assert entry.guarded(work) == 2
    assert "choose another" in capsys.readouterr().err


def test_a_bug_keeps_its_stack_trace():
    with pytest.raises(ZeroDivisionError):
        entry.guarded(raising(ZeroDivisionError()))


def test_a_script_exits_with_the_status_and_no_trace(tmp_path):
    program = "from launch import entry\nentry.run(lambda config: print(config.seed), 'Doc.')"
    done = subprocess.run([sys.executable, "-c", program, "--config.seed=5"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "5")
    done = subprocess.run([sys.executable, "-c", program, "--config.sed=5"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean seed" in done.stderr


def test_every_field_of_the_miniature_can_be_named():
    from stepdr_jax import configuration

    config = parse()
    assert isinstance(config, ConfigDict)
    assert all(configuration.unknown_field(config, name) is None for name, _ in configuration.fields(config))
