"""How the fields of a config are declared, read and checked; configs/base.py declares them. Imports without jax.

A config is checked once, before a stage does any work, so that a mistake costs a second and not a night. Names of
mixture components and paths are checked where they are used.
"""

import ast
import datetime
import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from stepdr_jax import files
from stepdr_jax.errors import UserError


class Rule(NamedTuple):
    """What a field's values must be: `expects` completes "expected ..."."""

    expects: str
    holds: Callable[[Any], bool]


class Field(NamedTuple):
    """A field. A dict as default declares a section with names of the user's choice; its rule is for each value."""

    default: Any
    rule: Rule
    note: str


class Section(NamedTuple):
    note: str
    members: dict[str, "Field | Section"]


def field(default: Any, rule: Rule, note: str = "") -> Field:
    return Field(default, rule, note)


def section(note: str, **members: Field | Section) -> Section:
    return Section(note, members)


# ------------------------------------------------------------------------------------------------------------- rules


def above(low: float) -> Rule:
    return Rule(f"a number above {low}", lambda value: value > low)


def at_least(low: float) -> Rule:
    return Rule(f"a number from {low} up", lambda value: value >= low)


def one_of(*values: Any) -> Rule:
    return Rule(f"one of {', '.join(map(str, values))}", lambda value: value in values)


def _date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def _schedule(value: tuple) -> bool:
    return all(isinstance(entry, tuple | list) and len(entry) == 2 and hasattr(entry[1], "keys") for entry in value)


NUMBER = Rule("a number", lambda value: value == value)
FRACTION = Rule("a share between 0 and 1", lambda value: 0 <= value <= 1)
POSITIVE_FRACTION = Rule("a share between 0 and 1, above 0", lambda value: 0 < value <= 1)
ENTRY = Rule("a path or a section, by a name of yours", lambda value: isinstance(value, str | ConfigDict | dict))
TEXT = Rule("text", lambda value: True)
FLAG = Rule("true or false", lambda value: True)
DIRECTORY = Rule("a folder, for example runs/mine", bool)
DATE = Rule("a date such as 2026-06-01", _date)
LOW_HIGH = Rule("(low, high) with 0 < low <= high", lambda value: len(value) == 2 and 0 < value[0] <= value[1])
STEP_RANGE = Rule("(first, last), or (0, 0) for none", lambda value: len(value) == 2 and 0 <= value[0] <= value[1])
MIXTURE_SCHEDULE = Rule("((step, dict(component=rate)), ...)", _schedule)
URLS = Rule(
    "addresses such as http://10.0.0.5:8000, separated by commas",
    lambda value: all(url.startswith(("http://", "https://")) for url in value),
)
even = Rule("an even number above 0", lambda value: value > 0 and value % 2 == 0)


# ------------------------------------------------------------------------------------------------ reading and writing


def build_config(declared: Section) -> ConfigDict:
    """The defaults. It is locked, except for sections with names of the user's choice."""

    def value(member: Field | Section) -> Any:
        if isinstance(member, Section):
            return ConfigDict({name: value(inner) for name, inner in member.members.items()})
        return ConfigDict(member.default) if isinstance(member.default, dict) else member.default

    config = value(declared).lock()
    for section in _open_sections(config, declared):
        section.unlock()
    return config


def declared_fields(declared: Section, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Yields (dotted name, field) in the order of declaration."""
    for name, member in declared.members.items():
        if isinstance(member, Section):
            yield from declared_fields(member, f"{prefix}{name}.")
        else:
            yield prefix + name, member


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def save_config(config: ConfigDict, directory: Path) -> None:
    """Writes `config` to config.json in `directory`, which any command takes as --config."""
    files.write_json(directory / "config.json", config.to_dict())


def load_config(path: Path, declared: Section) -> ConfigDict:
    """Reads what `save` wrote: JSON's lists become tuples. Raises UserError that names the file and the field."""
    try:
        values = json.loads(path.read_text(), object_pairs_hook=lambda pairs: {k: _tuples(v) for k, v in pairs})
    except ValueError as error:
        raise UserError(f"config file {path} is not valid JSON ({error}); correct it") from None
    if not isinstance(values, dict):
        raise UserError(f"config file {path}: expected an object of fields, got {type(values).__name__}")
    check_shape(ConfigDict(values), declared, f"config file {path}")
    config = build_config(declared)
    for section in _open_sections(config, declared):
        for name in list(section):
            del section[name]
    config.update(values)
    return config


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets the dotted field `name` from text, by the type the field has. Raises UserError for names and values."""
    problem = unknown_field(config, name)
    if problem:
        raise UserError(f"--config.{name}: {problem}")
    *parents, leaf = name.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    now = section[leaf]
    if isinstance(now, ConfigDict):
        raise UserError(f"--config.{name}: expected one of its fields (now a section), got {text!r}")
    try:
        section[leaf] = _typed(text, now)
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--config.{name}: expected {_kind(now)} (now {now!r}), got {text!r}") from None


def _typed(text: str, now: Any) -> Any:
    if isinstance(now, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(now, tuple | list):
        try:
            return tuple(ast.literal_eval(f"({text},)" if text and text[0] not in "([" else text or "()"))
        except SyntaxError:  # words
            return tuple(text.split(","))
    return type(now)(text)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _open_sections(config: ConfigDict, declared: Section) -> Iterator[ConfigDict]:
    for name, member in declared.members.items():
        if isinstance(member, Section):
            yield from _open_sections(config[name], member)
        elif isinstance(member.default, dict):
            yield config[name]


# ------------------------------------------------------------------------------------------------------------ checks


def unknown_field(config: ConfigDict, name: str) -> str | None:
    """Returns a sentence when `name` (dotted) is no field of `config`, naming what is close; None when it is one."""
    section, walked = config, []
    for part in name.split("."):
        if not isinstance(section, ConfigDict) or part not in section:
            known = sorted(section.keys()) if isinstance(section, ConfigDict) else []
            anywhere = [full for full, _ in fields(config) if full.rsplit(".", 1)[-1] == part]
            close = [".".join([*walked, match]) for match in difflib.get_close_matches(part, known, 3, 0.6)]
            hint = " or ".join((close + anywhere)[:3])
            where = ".".join(walked) or "the config"
            fix = f"did you mean {hint}?" if hint else f"it has {', '.join(known) or 'no fields'}"
            return f"{where} has no field {part!r}; {fix}"
        section = section[part]
        walked.append(part)
    return None


def misnamed(leaf: str, declared: Section) -> str:
    """The sentence about `leaf`, a field name without its section that does not exist."""
    names = [name for name, _ in declared_fields(declared)]
    close = difflib.get_close_matches(leaf, {name.rsplit(".", 1)[-1] for name in names}, 1)
    hint = " or ".join([name for name in names if close and name.rsplit(".", 1)[-1] == close[0]][:3])
    return f"there is no field {leaf!r}; {f'did you mean {hint}?' if hint else 'see docs/configuration.md'}"


def check_shape(config: ConfigDict, declared: Section, source: str = "the config", prefix: str = "") -> None:
    """Raises UserError when `config` lacks a declared field, has one more, or one of another type."""
    for key, member in declared.members.items():
        name = prefix + key
        if key not in config:
            raise UserError(f"{source} lacks {name}; add it, see docs/configuration.md")
        value = config[key]
        is_section = isinstance(member, Section) or isinstance(member.default, dict)
        if isinstance(value, ConfigDict) != is_section:
            raise UserError(f"{source}: {name}: expected {'a section' if is_section else 'a value'}, got {value!r}")
        if isinstance(member, Section):
            check_shape(value, member, source, f"{name}.")
        elif not is_section and _kind(value) not in _KINDS_FOR[_kind(member.default)]:
            raise UserError(f"{source}: {name}: expected {_kind(member.default)}, got {value!r}")
    for key in config:
        if key not in declared.members:
            close = difflib.get_close_matches(key, list(declared.members), 1)
            fix = f"did you mean {prefix}{close[0]}?" if close else "remove it"
            raise UserError(f"{source} has an unknown field {prefix}{key}; {fix}")


def check_values(config: ConfigDict, declared: Section) -> None:
    """Raises UserError for the first value that no stage could work with; the message names the field and the fix."""
    for name, field in declared_fields(declared):
        value = config
        for part in name.split("."):
            value = value[part]
        values = fields(value, f"{name}.") if isinstance(value, ConfigDict) else [(name, value)]
        for full_name, value in values:
            if not _holds(field.rule, value):
                raise UserError(f"{full_name}: expected {field.rule.expects}, got {value!r}")
    for check in CROSS_CHECKS:
        check(config)


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return bool(rule.holds(value))
    except (TypeError, AttributeError):  # an element of another type
        return False


def staleness_needs_tis_cap(config: ConfigDict) -> None:
    if config.ppo.staleness and not config.ppo.tis_cap:
        raise UserError(
            "ppo.tis_cap: expected a number above 0 where ppo.staleness is 1 (it bounds importance weights of stale "
            "episodes), got 0; for example --config.ppo.tis_cap=2"
        )


def kv_heads_divide_heads(config: ConfigDict) -> None:
    _divisor("model.num_kv_heads", config.model.num_kv_heads, "model.num_heads", config.model.num_heads)


def _training_sections(config: ConfigDict) -> list[str]:
    """Names of the sections of stages that train on packed data: those with a mixture."""
    return [name for name, value in config.items() if isinstance(value, ConfigDict) and "mixture" in value]


def microbatches_divide_batches(config: ConfigDict) -> None:
    for stage in _training_sections(config):
        _divisor(f"{stage}.microbatches", config[stage].microbatches, f"{stage}.batch_size", config[stage].batch_size)


def servers_sample_for_themselves(config: ConfigDict) -> None:
    sampler = config.sampler
    if sampler.engine == "jax":
        return
    if not sampler.urls:
        raise UserError(
            f"sampler.urls: expected addresses of {sampler.engine} servers, got (); for example "
            "--config.sampler.urls=http://10.0.0.5:8000"
        )
    if sampler.engine == "vllm" and not sampler.model:
        raise UserError(
            "sampler.model: expected the name of the model at the vLLM servers (--served-model-name), got ''"
        )
    if config.placement.sampler != "colocated":
        raise UserError(
            f"placement.sampler: expected colocated where sampler.engine is {sampler.engine} (servers take no device "
            f"of this process), got {config.placement.sampler}"
        )


def something_is_drawn(config: ConfigDict) -> None:
    for stage in _training_sections(config):
        if not any(config[stage].mixture.values()):
            raise UserError(f"{stage}.mixture: expected at least one component with a rate above 0")
    if not any(config.synthesis.kind_weights.values()):
        raise UserError("synthesis.kind_weights: expected at least one kind with a weight above 0")


def turns_fit_episodes(config: ConfigDict) -> None:
    agent = config.agent
    if agent.max_turn_tokens > agent.max_episode_tokens:
        raise UserError(
            f"agent.max_turn_tokens: expected at most agent.max_episode_tokens {agent.max_episode_tokens}, "
            f"got {agent.max_turn_tokens}"
        )


CROSS_CHECKS = (
    staleness_needs_tis_cap,
    kv_heads_divide_heads,
    microbatches_divide_batches,
    servers_sample_for_themselves,
    something_is_drawn,
    turns_fit_episodes,
)


def _divisor(name: str, value: int, of_name: str, of: int) -> None:
    if of % value:
        raise UserError(f"{name}: expected a divisor of {of_name} {of}, got {value}")


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", tuple: "a tuple such as (3,10)"}
_KINDS_FOR = {kind: {kind} for kind in _KINDS.values()} | {"a number": {"a number", "an integer"}}


def _kind(value: Any) -> str:
    return _KINDS.get(tuple if isinstance(value, list) else type(value), "a value")
