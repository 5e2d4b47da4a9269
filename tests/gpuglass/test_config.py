"""File, variables and defaults: what is taken, and what is refused in one line that names where it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuglass import cli, config
from gpuglass.config import (
    Config,
    GpuConfig,
    Mode,
    Seconds,
    TenantQuota,
    check_reload,
    leaves,
    load,
    value_of,
    variable,
)
from gpuglass.config_command import show
from gpuglass.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "agent.yaml"


def refused(path: Path | None = None, **environ: str) -> str:
    """The one line of the refusal."""
    with pytest.raises(ConfigError) as error:
        load(path, environ)
    text = str(error.value)
    assert len(text.splitlines()) == 1, text
    assert len(text) < 600
    return text


# What is taken


def test_nothing_given_is_the_defaults() -> None:
    assert load(None, {}) == Config()


def test_each_key_of_a_file_is_taken_and_the_others_stay(file: Path) -> None:
    file.write_text("gpu:\n  interval: 500ms\n  process: {limit: 7}\nserver: {listen: '0.0.0.0:1'}\n")
    loaded = load(file, {})
    assert (loaded.gpu.interval, loaded.gpu.process.limit, loaded.server.listen) == (0.5, 7, "0.0.0.0:1")
    assert config.changed_keys(Config(), loaded) == ["server.listen", "gpu.interval", "gpu.process.limit"]


def test_a_file_may_be_json(file: Path) -> None:
    file.write_text(json.dumps({"gpu": {"interval": 2, "xid_events": False}}))
    assert load(file, {}).gpu == GpuConfig(interval=Seconds(2), xid_events=False)


def test_a_variable_goes_over_the_file_and_the_file_over_the_default(file: Path) -> None:
    file.write_text("gpu: {interval: 2s, hang_timeout: 3s}")
    loaded = load(file, {"GPUGLASS_GPU_INTERVAL": "4s"})
    assert (loaded.gpu.interval, loaded.gpu.hang_timeout) == (4, 3)
    assert loaded.gpu.retry_interval == GpuConfig().retry_interval


def test_the_file_may_be_named_by_a_variable_and_an_argument_goes_over_that(
    file: Path, tmp_path: Path
) -> None:
    file.write_text("log: {level: debug}")
    other = tmp_path / "other.yaml"
    other.write_text("log: {level: error}")
    assert load(None, {"GPUGLASS_CONFIG": str(file)}).log.level == "debug"
    assert load(other, {"GPUGLASS_CONFIG": str(file)}).log.level == "error"
    assert load(None, {"GPUGLASS_CONFIG": ""}) == Config()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment\n",
        "---\n",
        "gpu:\n",
        "gpu:\n  # interval: 1s\nlog:\n",
        "gpu:\n  process:\n",
        "gpu: {process: }\nkubernetes: null",
        "gpu: {}\n",
    ],
)
def test_an_empty_file_or_section_says_nothing(file: Path, text: str) -> None:
    file.write_text(text)
    assert load(file, {}) == Config()


def test_a_variable_fills_a_section_that_is_empty_in_the_file(file: Path) -> None:
    file.write_text("gpu:\n  process:\nlog:\n")
    loaded = load(file, {"GPUGLASS_GPU_PROCESS_LIMIT": "3", "GPUGLASS_LOG_LEVEL": "debug"})
    assert (loaded.gpu.process.limit, loaded.log.level) == (3, "debug")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("500ms", 0.5), ("1s", 1), ("1.5s", 1.5), ("2m", 120), ("1h", 3600), (" 3s ", 3), (2, 2), (0.25, 0.25)],
)
def test_durations(written: object, seconds: float) -> None:
    assert Seconds.parse(written) == seconds


@pytest.mark.parametrize(
    "written",
    [
        *("", "1", "1 s", "s", "-1s", "+1s", "1S", "1w", "1m30s", ".5s", "1e3s", "١s", "nan"),
        *(True, None, [], float("nan"), float("inf")),
    ],
)
def test_what_is_no_duration(written: object) -> None:
    with pytest.raises(ValueError, match="expected a duration such as 500ms"):
        Seconds.parse(written)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("gpu.interval", "500ms", 0.5),
        ("gpu.interval", "2", 2),
        ("gpu.enabled", "false", False),
        ("gpu.enabled", "no", False),
        ("gpu.process.limit", "12", 12),
        ("server.listen", "[::]:9955", "[::]:9955"),
        ("server.listen", "123", "123"),
        ("server.web_config_file", "", ""),
        ("proc", "/host/proc", "/host/proc"),
        ("log.level", "debug", "debug"),
        ("kubernetes.resources", "nvidia.com/gpu, amd.com/gpu,", ("nvidia.com/gpu", "amd.com/gpu")),
        ("kubernetes.resources", "", ()),
        ("engines.allow_uids", "1000, 0", (1000, 0)),
        ("engines.directory_mode", "0750", "0750"),
        ("engines.tenants.quotas", "{a: {kv_share: 0.5}}", {"a": TenantQuota(kv_share=0.5)}),
    ],
)
def test_variables_are_read_as_their_keys_want_it(key: str, text: str, value: object) -> None:
    assert value_of(load(None, {variable(key): text}), key) == value


def test_every_key_has_a_variable_of_its_own() -> None:
    names = [variable(key) for key, _, _ in leaves()]
    assert len(names) == len(set(names))
    assert not set(names) & config.FOREIGN_VARIABLES
    assert variable("gpu.process.limit") == "GPUGLASS_GPU_PROCESS_LIMIT"


@pytest.mark.parametrize(
    "name",
    [
        "GPUGLASS_SERVICE_HOST",
        "GPUGLASS_SERVICE_PORT",
        "GPUGLASS_SERVICE_PORT_HTTP_METRICS",
        "GPUGLASS_PORT",
        "GPUGLASS_PORT_9955_TCP",
        "GPUGLASS_PORT_9955_TCP_ADDR",
        "GPUGLASS_AGENT_SERVICE_HOST",
        "GPUGLASS_AGENT_PORT_9955_TCP_PROTO",
        "GPUGLASS_CACHE",
        "GPUGLASS_REQUIRE",
        "OTHER_GPU_INTERVAL",
        "gpuglass_gpu_interval",
    ],
)
def test_variables_of_others_are_left_alone(name: str) -> None:
    assert load(None, {name: "tcp://10.0.0.1:9955"}) == Config()


# What is refused

COUNT = "must be a whole number from 1 to 100000"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("gpu: {intervall: 1s}", "gpu.intervall: no such key; did you mean gpu.interval?"),
        ("xyz: 1", "xyz: no such key; `gpuglass config show` lists them"),
        ("gpus: {}", "gpus: no such key; did you mean gpu?"),
        ("gpu: {process: {limt: 1}}", "gpu.process.limt: no such key; did you mean gpu.process.limit?"),
        ("gpu: {interval: soon}", "gpu.interval: expected a duration such as 500ms, 1s or 2m, is 'soon'"),
        ("gpu: {interval: true}", "gpu.interval: expected a duration such as 500ms, 1s or 2m, is True"),
        ("gpu: {interval: .nan}", "gpu.interval: expected a duration such as 500ms, 1s or 2m, is nan"),
        ("gpu: {interval: }", "gpu.interval: expected a duration such as 500ms, 1s or 2m, is None"),
        ("gpu: {interval: 50ms}", "gpu.interval: must be between 0.1s and 60s, is 0.05s"),
        ("gpu: {interval: 2m}", "gpu.interval: must be between 0.1s and 60s, is 120s"),
        ("gpu: {interval: -1}", "gpu.interval: must be between 0.1s and 60s, is -1s"),
        ("gpu: {slow_interval: 301}", "gpu.slow_interval: must be between 0.1s and 300s, is 301s"),
        ("gpu: {hang_timeout: 0}", "gpu.hang_timeout: must be between 0.5s and 300s, is 0s"),
        ("gpu: {retry_interval: 2h}", "gpu.retry_interval: must be between 0.1s and 3600s, is 7200s"),
        ("server: {request_timeout: 0}", "server.request_timeout: must be between 0.1s and 300s, is 0s"),
        ("server: {idle_timeout: 0}", "server.idle_timeout: must be between 1s and 3600s, is 0s"),
        ("kubernetes: {refresh: 0}", "kubernetes.refresh: must be between 1s and 600s, is 0s"),
        ("gpu: {slow_interval: 1s, interval: 2s}", "gpu.slow_interval: 1s is less than interval, 2s"),
        ("gpu: {process: {limit: 0}}", f"gpu.process.limit: {COUNT}, is 0"),
        ("gpu: {process: {limit: 1.5}}", f"gpu.process.limit: {COUNT}, is 1.5"),
        ("server: {max_scrapes: 100001}", f"server.max_scrapes: {COUNT}, is 100001"),
        ("gpu: {enabled: 1}", "gpu.enabled: must be true or false, is 1"),
        ("gpu: {enabled: 'yes'}", "gpu.enabled: must be true or false, is 'yes'"),
        ("log: {level: loud}", "log.level: must be one of debug, info, warning, error, is 'loud'"),
        ("log: {level: 5}", "log.level: must be one of debug, info, warning, error, is 5"),
        ("log: {format: [json]}", "log.format: must be one of text, json, is ['json']"),
        ("server: {listen: 9955}", "server.listen: must be a text, is 9955"),
        ("proc: {}", "proc: must be a text, is {}"),
        ("gpu: 5", "gpu: expected keys below it, got int"),
        ("gpu: [interval]", "gpu: expected keys below it, got array"),
        ("gpu: {process: 64}", "gpu.process: expected keys below it, got int"),
        ("kubernetes: {resources: nvidia.com/gpu}", "kubernetes.resources: expected array"),
        ("kubernetes: {resources: [1]}", "kubernetes.resources[0]: must be a text, is 1"),
        ("engines: {allow_uids: [0, x]}", "engines.allow_uids[1]: must be a user's number (uid), is 'x'"),
        ("engines: {allow_uids: [-1]}", "engines.allow_uids[0]: must be a user's number (uid), is -1"),
        ("engines: {directory_mode: 0750}", 'engines.directory_mode: expected a mode in quotes'),
        ('engines: {socket_mode: "0888"}', 'engines.socket_mode: expected a mode in quotes'),
        ("engines: {socket: run/x}", "engines.socket: must be an absolute path, is 'run/x'"),
        ("engines: {socket: /" + "x" * 107 + "}", "engines.socket: a socket's path has at most 107 bytes"),
        ("engines: {limits: {senders: 5000}}", "engines.limits.senders: at most 4096, is 5000"),
        ("engines: {tenants: {quotas: {a: {kv_share: 2}}}}", "engines.tenants.quotas[...].kv_share: "),
        ("engines: {tenants: {quotas: {a: {kv_share: .nan}}}}", "engines.tenants.quotas[...].kv_share: "),
        ("engines: {tenants: {quotas: {a: {gpu_seconds_per_day: -1}}}}", "engines.tenants.quotas[...].gpu_"),
        ("engines: {tenants: {quotas: {'': {}}}}", "engines.tenants.quotas: a tenant's name has 1 to 64"),
        ("engines: {tenants: {limit: 1, quotas: {a: {}, b: {}}}}", "engines.tenants.quotas: 2 tenants"),
        ("engines: {tenants: {quotas: {a: {x: 1}}}}", "engines.tenants.quotas[...].x: no such key"),
        ("gpu: {interval: 1s, interval: 2s}", "line 1: interval is given twice"),
        ("gpu: {}\nlog: {}\ngpu: {}", "line 3: gpu is given twice"),
        ("gpu:\n  interval: 1s\n bad", "line 3: "),
        ("gpu: [", "line 1: "),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("gpu: *x", "line 1: found undefined alias"),
        ("gpu: !!python/object:os.system {}", "line 1: could not determine a constructor"),
        ("gpu: {interval: !!bool soon}", "not valid YAML"),
        ("gpu: {interval: !!int ''}", "not valid YAML"),
        ("gpu: {interval: !!timestamp soon}", "not valid YAML"),
        ("gpu: {interval: 2026-99-99}", "not valid YAML: month must be in 1..12"),
        ("gpu: {}\n---\nlog: {}", "line 2: but found another document"),
        ("1: 2", "line 1: key 1 is not a word"),
        ("null: 2", "line 1: key None is not a word"),
        ("[a]: 2", "line 1: key [] is not a word"),
        ("- gpu", "the top must be a mapping of keys, is a list"),
        ("just words", "the top must be a mapping of keys, is a str"),
        ("\"a\\nb\": 1\n\"a\\nb\": 2", "line 2: a b is given twice"),
        ("\"a\\nb\": 1", "a b: no such key"),
        ("gpu: {interval: \"a\\nb\"}", r"gpu.interval: expected a duration such as 500ms, 1s or 2m, is 'a\n"),
        ("gpu: \x00", "unacceptable character"),
        ("\t gpu: 1", "line 1: "),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_name_and_the_key(file: Path, text: str, line: str) -> None:
    file.write_text(text)
    said = refused(file)
    assert said.startswith(f"{file}: ")
    assert said.removeprefix(f"{file}: ").startswith(line)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("GPUGLASS_GPU_INTERVAL", "soon", "expected a duration such as 500ms, 1s or 2m, is 'soon'"),
        ("GPUGLASS_GPU_INTERVAL", "", "expected a duration such as 500ms, 1s or 2m, is ''"),
        ("GPUGLASS_GPU_INTERVAL", "0", "must be between 0.1s and 60s, is 0s"),
        ("GPUGLASS_GPU_INTERVAL", "[", "expected a duration such as 500ms, 1s or 2m, is '['"),
        ("GPUGLASS_GPU_INTERVAL", "2026-99-99", "expected a duration"),
        ("GPUGLASS_GPU_INTERVAL", "!!bool x", "expected a duration"),
        ("GPUGLASS_GPU_INTERVAL", "[" * 1000, "expected a duration"),
        ("GPUGLASS_GPU_INTERVAL", "9" * 5000, "expected a duration"),
        ("GPUGLASS_GPU_ENABLED", "maybe", "must be true or false, is 'maybe'"),
        ("GPUGLASS_GPU_PROCESS_LIMIT", "many", "must be a whole number from 1 to 100000, is 'many'"),
        ("GPUGLASS_GPU_PROCESS_LIMIT", "-1", "must be a whole number from 1 to 100000, is -1"),
        ("GPUGLASS_ENGINES_ALLOW_UIDS", "1," + "9" * 5000, "must be a user's number (uid), is '999"),
        ("GPUGLASS_ENGINES_TENANTS_QUOTAS", "a", "expected keys below it, is 'a'"),
        ("GPUGLASS_LOG_LEVEL", "INFO", "must be one of debug, info, warning, error, is 'INFO'"),
        ("GPUGLASS_GPU_INTERVALL", "1s", "no such setting; did you mean GPUGLASS_GPU_INTERVAL?"),
        ("GPUGLASS_XYZ", "1", "no such setting; `gpuglass config show` lists them"),
        ("GPUGLASS_", "1", "no such setting"),
        ("GPUGLASS_GPU_PORT_COUNT", "1", "no such setting"),
    ],
)
def test_a_bad_variable_is_refused_with_its_name_and_not_the_files(
    file: Path, name: str, text: str, line: str
) -> None:
    file.write_text("gpu: {interval: 1s}")
    assert refused(file, **{name: text}).startswith(f"{name}: {line}")


def test_a_variable_below_what_is_no_section_does_not_hide_the_files_fault(file: Path) -> None:
    file.write_text("gpu: 5")
    assert refused(file, GPUGLASS_GPU_PROCESS_LIMIT="3").startswith(f"{file}: gpu: expected keys below it")


def test_without_a_file_a_fault_of_two_variables_still_names_the_key() -> None:
    said = refused(GPUGLASS_GPU_INTERVAL="50s", GPUGLASS_GPU_SLOW_INTERVAL="40s")
    assert said == "GPUGLASS_GPU_SLOW_INTERVAL: 40s is less than interval, 50s"
    said = refused(GPUGLASS_GPU_INTERVAL="50s")
    assert (
        said == f"configuration: gpu.slow_interval: {GpuConfig().slow_interval:g}s is less than interval, 50s"
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "cannot read it: No such file or directory"),
        (lambda path: path.mkdir(), "cannot read it: Is a directory"),
        (lambda path: path.write_bytes(b"gpu: \xff"), "unacceptable character #x00ff: invalid start byte"),
        (lambda path: path.write_bytes(b"#" * (config.MAX_FILE_BYTES + 1)), "larger than 1024 KiB"),
        (lambda path: path.write_text("a: " + "[" * 1000), "not valid YAML"),
        (lambda path: path.write_text("gpu: {interval: '" + "x" * 100_000 + "'}"), "gpu.interval: expected"),
        (lambda path: path.write_text("? " + "x" * 100_000 + "\n: 1"), "x"),
        (lambda path: path.write_text(LAUGHS), "gpu.interval: expected a duration"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(file: Path, make: Any, reason: str) -> None:
    make(file)
    said = refused(file)
    assert said.startswith(f"{file}: {reason}")


LAUGHS = "gpu:\n  interval:\n    - &a [1, 1]\n" + "".join(
    f"    - &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(24)
)
"""Lists that double with each line: what a message shows of them must stay small."""


def test_a_file_just_within_the_bound_is_read(file: Path) -> None:
    file.write_bytes(b"log: {level: debug}\n" + b"#" * (config.MAX_FILE_BYTES - 20))
    assert load(file, {}).log.level == "debug"


TOKENS = [
    *("gpu", "log", "interval", "level", "1s", "1", ".inf", "2026-99-99", " ", "  ", "\n", ": ", "? ", "- "),
    *(
        "{",
        "}",
        "[",
        "]",
        ",",
        "'",
        '"',
        "|",
        "%",
        "@",
        "~",
        "---",
        "&a ",
        "*a ",
        "<<: ",
        "!!int ",
        "!!bool ",
    ),
    *("!!float ", "!!null ", "!!set ", "!!omap ", "!!binary ", "!!timestamp "),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=200),
        st.lists(
            st.sampled_from(TOKENS),
            max_size=20,
        ).map("".join),
    )
)  # fmt: skip
def test_any_text_is_taken_or_refused_in_one_line(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    try:
        loaded = load(file, {})
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith(str(file))
    else:
        assert isinstance(loaded, Config)


# Reload


def test_keys_that_can_change_while_it_runs() -> None:
    new = Config(gpu=GpuConfig(interval=Seconds(2)), log=config.LogConfig(level="debug"))
    assert check_reload(Config(), new) == ["log.level", "gpu.interval"]
    assert check_reload(Config(), Config()) == []


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({"GPUGLASS_SERVER_MAX_SCRAPES": "9"}, "server.max_scrapes"),
        ({"GPUGLASS_PROC": "/host/proc"}, "proc"),
        ({"GPUGLASS_KUBERNETES_POD_LOGS": "/x"}, "kubernetes.pod_logs"),
        ({"GPUGLASS_GPU_ENABLED": "false"}, "gpu.enabled"),
        ({"GPUGLASS_GPU_NVML_LIBRARY": "/x"}, "gpu.nvml_library"),
        ({"GPUGLASS_GPU_XID_EVENTS": "false"}, "gpu.xid_events"),
        ({"GPUGLASS_ENGINES_SOCKET": "/x"}, "engines.socket"),
        ({"GPUGLASS_ENGINES_OWNER": "x"}, "engines.owner"),
    ],
)
def test_keys_that_need_a_restart(environ: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: cannot change while the agent runs; restart it"):
        check_reload(Config(), load(None, environ))


def test_gpu_process_is_no_key_of_proc() -> None:
    assert check_reload(Config(), load(None, {"GPUGLASS_GPU_PROCESS_LIMIT": "5"})) == ["gpu.process.limit"]


# Show and check


def test_what_is_shown_is_the_defaults_when_it_is_loaded_again(file: Path) -> None:
    file.write_text(show(Config()))
    assert load(file, {}) == Config()


def test_each_key_is_shown_once_with_its_variable() -> None:
    text = show(Config())
    for key, _, _ in leaves():
        assert text.count(f" # {variable(key)}\n") == 1
    assert "  interval: 1s " in text
    assert yaml.safe_load(text)["gpu"]["process"] == {"pid_label": False, "limit": 64}


_BOUNDS = {
    "server.request_timeout": (0.1, 300),
    "server.idle_timeout": (1, 3600),
    "kubernetes.refresh": (1, 600),
    "gpu.interval": (0.1, 60),
    "gpu.slow_interval": (60, 300),
    "gpu.hang_timeout": (0.5, 300),
    "gpu.retry_interval": (0.1, 3600),
    "engines.experts.window": (10, 3600),
    "tracer.interval": (0.1, 300),
    "tracer.reconcile_interval": (0.1, 600),
    "traces.timeout": (0.1, 60),
}
_QUOTAS = st.dictionaries(
    st.text(st.characters(categories=("L", "N")), min_size=1, max_size=64),
    st.builds(
        TenantQuota,
        gpu_seconds_per_day=st.none() | st.floats(0, 1e11),
        kv_share=st.none() | st.floats(0, 1),
    ),
    max_size=1,
)
_PRICES = st.dictionaries(
    st.sampled_from(["NVIDIA H800", "NVIDIA A100.*", r"(?i)\S+ \u00e9\\.\""]),
    st.floats(0, 999_999),
    max_size=3,
)


def _values(key: str, kind: Any) -> st.SearchStrategy[Any]:
    if kind is Seconds:
        return st.floats(*_BOUNDS[key]).map(Seconds)
    if kind is bool:
        return st.booleans()
    if key == "engines.socket":
        return st.sampled_from(["", "/run/a b/\u00e9.sock"])
    if key == "prices.currency":
        return st.sampled_from(["USD", "credits"])
    if key == "traces.endpoint":
        return st.sampled_from(["", "http://[::1]:4317", "https://collector.example/otlp"])
    if key in ("traces.tls.cert_file", "traces.tls.key_file"):
        return st.just("/tls/\u00e9 #1")  # one needs the other
    if kind is str:
        return st.text(st.characters())
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        of = st.integers(0, 2**32 - 2) if get_args(kind)[0] == config.Uid else st.text(st.characters())
        return st.lists(of, max_size=3).map(tuple)
    if kind is Mode:
        return st.integers(0, 0o777).map(lambda bits: Mode(f"{bits:04o}"))
    if key == "traces.resource":
        return st.dictionaries(st.text(st.characters()), st.text(st.characters()), max_size=3)
    if get_origin(kind) is dict:
        return _QUOTAS if key == "engines.tenants.quotas" else _PRICES
    if key.startswith(("tracer.", "traces.")) and kind != config.Count and get_origin(kind) is Annotated:
        of, meta = get_args(kind)
        return st.floats(meta.ge, meta.le) if of is float else st.integers(meta.ge, meta.le)
    assert kind == config.Count, key
    return st.integers(1, config.MAX_SENDERS if key == "engines.limits.senders" else 100_000)


def _with(values: dict[str, Any]) -> Config:
    document: dict[str, Any] = {}
    for key, value in values.items():
        *sections, leaf = key.split(".")
        into = document
        for section in sections:
            into = into.setdefault(section, {})
        into[leaf] = value
    return msgspec.convert(document, Config, dec_hook=lambda kind, value: kind.parse(value))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.fixed_dictionaries({key: _values(key, kind) for key, kind, _ in leaves()}))
def test_any_configuration_comes_back_from_what_is_shown(file: Path, values: dict[str, Any]) -> None:
    shown = show(_with(values))
    file.write_text(shown, encoding="ascii")
    again = load(file, {})
    assert {key: value_of(again, key) for key in values} == values


def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpuglass", "config", *arguments],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_show_on_the_command_line_is_a_file_that_check_takes(file: Path) -> None:
    shown = run("show", cwd=file.parent, GPUGLASS_GPU_INTERVAL="500ms", GPUGLASS_PROC='/a "b" \\c: #d')
    assert (shown.returncode, shown.stderr) == (0, "")
    file.write_text(shown.stdout)
    assert (load(file, {}).gpu.interval, load(file, {}).proc) == (0.5, '/a "b" \\c: #d')
    checked = run("check", str(file), cwd=file.parent)
    assert (checked.returncode, checked.stdout) == (0, f"{file}: ok\n")


def test_check_gives_2_and_one_line_for_a_bad_file_and_for_a_bad_variable(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("gpu: {intervall: 1s}")
    assert cli.main(["config", "check", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"gpuglass: {file}: gpu.intervall: no such key; did you mean gpu.interval?\n"
    )
    file.write_text("gpu: {interval: 1s}")
    monkeypatch.setenv("GPUGLASS_GPU_INTERVAL", "soon")
    assert cli.main(["config", "check", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gpuglass: GPUGLASS_GPU_INTERVAL: ")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the session, such as its mark, is a setting here."""
    for name in [name for name in os.environ if name.startswith("GPUGLASS_")]:
        monkeypatch.delenv(name)
