"""Start of every command: flags, config, and one-line errors that say how to fix them.

A script defines `main(config)` and ends with `entry.run(main, __doc__)`. Its own flags are absl flags. Exit codes:
0 done, 1 a bug (with its stack trace), 2 something the user can fix, 75 preempted or another process lost: run the same
command again, 130 interrupted, 143 terminated.
"""

import contextlib
import ctypes
import difflib
import errno
import importlib.util
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from configs import base
from stepdr_jax import configuration
from stepdr_jax.errors import UserError
from stepdr_jax.orchestration.process import DIE_WITH_PARENT

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "miniature.py"

KEPT = "finished work is kept"

_arguments: list[str] = []
_config_arguments: list[str] = []


def run(
    main: Callable[[ConfigDict], Any], doc: str | None = None, *, positional: str = "", many_processes: bool = False
) -> NoReturn:
    """Parses the command line, runs `main(config)` and exits.

    Args:
        main: the script's work; its return value is the exit status if it is an int.
        doc: the script's docstring, shown by --help.
        positional: what the words after the flags mean, for --help and errors; "" means there may be none.
        many_processes: the script may be one of the processes of config.distributed.
    """
    _die_with_parent()
    signal.signal(signal.SIGTERM, _terminate)
    if many_processes:
        sys.exit(among_others(lambda: parse(sys.argv, doc, positional=positional), main))
    sys.exit(guarded(lambda: main(parse(sys.argv, doc, positional=positional))))


def among_others(parse_line: Callable[[], ConfigDict], main: Callable[[ConfigDict], Any]) -> int:
    """`guarded`, after joining config.distributed; a process that fails tells the others at once."""

    def work():
        config = parse_line()
        from stepdr_jax.runtime import distributed  # after the flags: a mistyped flag need not wait for jax

        distributed.initialize(config)
        with distributed.failing_together():
            return main(config)

    try:
        status = guarded(work)
    except Exception:
        traceback.print_exc()
        status = 1
    if status and "stepdr_jax.runtime.distributed" in sys.modules:
        sys.modules["stepdr_jax.runtime.distributed"].exit_if_failed(status)
    return status


def guarded(work: Callable[[], Any]) -> int:
    """Runs `work` and returns the exit status; an error that the user can fix is one line on standard error."""
    try:
        status = work()
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        _say("interrupted; run the same command to continue")
        return 130
    except BrokenPipeError:  # the reader of the output is gone
        _silence_stdout()
        return 0
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        _say(f"error: {line}")
        return 2


def explain(error: BaseException) -> str | None:
    """Returns one line that says how to fix it, or None for a bug, which needs its stack trace."""
    seen = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, UserError) or type(cause).__name__ in _NAMED:
            return " ".join(str(cause).split())
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {cause.filename}" if cause.filename else ""
            return f"disk full{where}; free space and run the same command: {KEPT}"
        if isinstance(cause, PermissionError) and cause.filename:
            return (
                f"{cause.filename}: permission denied; make it readable and writable for this user, or change run_dir"
            )
        if isinstance(cause, OSError) and cause.filename and cause.errno in _ABOUT_A_PATH:
            return f"{cause.filename}: {cause.strerror}; check this path, or change --config.run_dir"
        if isinstance(cause, OSError) and cause.errno in _STORAGE_GONE:
            where = f" of {cause.filename}" if cause.filename else ""
            return f"the storage{where} failed ({cause.strerror}); when it is back, run the same command: {KEPT}"
        cause = cause.__cause__ or cause.__context__
    # array_record, tensorstore and orbax write in C++ and report a full disk only as text.
    if "No space left on device" in str(error):
        return f"disk full; free space and run the same command: {KEPT}"
    return None


def arguments() -> list[str]:
    """The words of the command line that are not flags."""
    return list(_arguments)


def config_arguments() -> list[str]:
    """The --config flags as given, to start another script with the same config."""
    return list(_config_arguments)


def parse(argv: list[str], doc: str | None = None, *, positional: str = "") -> ConfigDict:
    """Returns the locked, checked config of a command line; raises UserError for whatever is wrong with it."""
    if any(word in ("--help", "-h", "-help", "--helpfull", "--helpshort") for word in argv[1:]):
        print(usage(argv[0], doc, positional))
        sys.exit(0)
    config_words, others = _split(argv[1:])
    _arguments[:] = _parse_script_flags([argv[0], *others])
    if _arguments and not positional:
        raise UserError(f"expected only flags, got {_arguments[0]!r}; flags are written --name=value")
    path, overrides = "", {}
    for word in config_words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{name}: expected {name}=VALUE")
        if name == "--config":
            path = value
        else:
            overrides[name.removeprefix("--config.")] = value
    config = load(path or DEFAULT_CONFIG)
    for name, value in overrides.items():
        configuration.override(config, name, value)
    config.config_file = path
    configuration.check_values(config, base.FIELDS)
    _config_arguments[:] = config_words
    return config.lock()


def load(path: str | os.PathLike) -> ConfigDict:
    """Loads a config: what a Python file's `get_config()` returns, or the config.json that a run has written.

    Raises:
        UserError: there is no such file, or it does not give exactly the fields of configs/base.py.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(_no_file(path))
    if path.suffix == ".json":
        return configuration.load_config(path, base.FIELDS)
    config = _call_get_config(path)
    configuration.check_shape(config, base.FIELDS, f"config file {path}")
    return config


def usage(program: str, doc: str | None, positional: str = "") -> str:
    """The text of --help: docstring, flags, and how to change a config field."""
    module = _module_name(program)
    lines = [(doc or "").strip(), "", f"usage: python -m {module} [flags]{' ' + positional if positional else ''}", ""]
    lines += ["flags:", f"  --config=FILE  Python file, or a run's config.json (default: {_short(DEFAULT_CONFIG)})"]
    lines += ["  --config.FIELD=VALUE  change one field (docs/configuration.md lists them all)"]
    for flag in _script_flags():
        default = "" if flag.default in (None, "", False) else f" (default: {flag.default})"
        lines.append(f"  --{flag.name}{'' if flag.boolean else '=VALUE'}  {flag.help}{default}")
    lines += [
        "",
        f"example: python -m {module} --config=configs/miniature.py --config.run_dir=runs/mine --config.seed=1",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- details

# Errors of modules that a script may not import; their messages name the fix, as those of UserError do.
_NAMED = ("ToolHostError", "ToolInfraError", "EndpointError")
_ABOUT_A_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
_STORAGE_GONE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENXIO, errno.ENODEV)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Separates --config words (`--config X` becomes `--config=X`) from all others."""
    config_words, others = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return config_words, [*others, word, *rest]
        if re.match(r"--?config(\.|=|$)", word):
            word = "--" + word.lstrip("-")
            takes_next = "=" not in word and rest and not rest[0].startswith("--")
            config_words.append(f"{word}={rest.pop(0)}" if takes_next else word)
        else:
            others.append(word)
    return config_words, others


def _parse_script_flags(argv: list[str]) -> list[str]:
    # Tests run several scripts in one process, so parse again for each.
    flags.FLAGS.unparse_flags()
    try:
        return flags.FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        known = [flag.name for flag in _script_flags()] + ["config"]
        close = difflib.get_close_matches(error.flagname, known, 2)
        names = ", ".join(f"--{name}" for name in (close or known))
        hint = f"did you mean {names}?" if close else f"this script has {names}"
        raise UserError(f"unknown flag --{error.flagname}; {hint}") from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None


def _script_flags() -> list[flags.Flag]:
    """Flags that our scripts define, without those of libraries."""
    found = []
    for module, its_flags in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("launch.") or _module_name(module) != Path(module).stem:
            found += its_flags
    return found


def _no_file(path: Path) -> str:
    if path.is_dir():
        written = sorted(path.glob("*.py")) or sorted([*path.glob("config.json"), *path.glob("*/*/config.json")])
        hint = f"; for example --config={written[0]}" if written else ""
        return f"config file {path} is a folder; give a Python file, or the config.json of a run{hint}"
    folder = path.parent if path.parent.is_dir() else DEFAULT_CONFIG.parent
    names = [str(other) for other in sorted(folder.glob("*.*")) if other.suffix in (".py", ".json")]
    close = difflib.get_close_matches(str(path), names, 1, 0.4)
    hint = f"did you mean {close[0]}?" if close else f"for example --config={_short(DEFAULT_CONFIG)}"
    return f"config file {path} does not exist; {hint}"


def _call_get_config(path: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path}: expected a Python file (.py) or a run's config.json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            about = (module.__doc__ or "").strip().partition("\n")[0]
            raise UserError(f"config file {path} has no get_config(), so that it is no config. {about}")
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        unknown = re.search(r'Key "(\w+)" does not exist and cannot be added', str(error))
        if unknown:  # assigned, or given to update(), in a file that did not unlock the config
            problem = configuration.misnamed(unknown[1], base.FIELDS)
            raise UserError(f"config file {path}: {problem}") from error
        raise UserError(
            f"config file {path} does not load: {type(error).__name__}: {error}; correct the file"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config file {path}: expected get_config() to return a ConfigDict, got {type(config).__name__}"
        )
    return config


def _short(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _module_name(program: str) -> str:
    """launch.research for .../launch/research.py, launch.bench for .../launch/bench/__main__.py; else the file name."""
    path, folder = Path(program).resolve(), Path(__file__).resolve().parent
    if not path.is_relative_to(folder):
        return path.stem
    return ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__main__")


def _say(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _silence_stdout() -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: Any) -> NoReturn:
    sys.exit(128 + signum)


def _die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that a killed quickstart leaves no stage running.

    By SIGKILL: the handler of another signal waits for a running compilation. Files of a stage survive it.
    """
    parent = os.environ.pop(DIE_WITH_PARENT, "")
    if not parent or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):  # the parent died before the request took effect
        sys.exit(128 + signal.SIGTERM)
