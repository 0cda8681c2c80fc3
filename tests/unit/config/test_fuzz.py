"""Any bytes in a configuration file give a configuration or a ConfigError of one line, nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_supcon import config as cfg
from hpc_supcon.config import yaml12
from hpc_supcon.errors import ConfigError

fuzz = settings(max_examples=200)
SCALARS = st.sampled_from(
    ["1", "-0", "1e999", ".nan", "-.inf", "0x", "0o9", "9" * 5000, "~", "true", "''", '"\\ud800"', "*a", "&a x", "<<",
     "=", "!!int x", "!!float x", "!!binary =", "!!timestamp 2024-99-99", "!!set {}", "!!omap [a]", "!x y", "|", ">-",
     "? x", "- -", "[", "{", "%YAML 9.9", "---", "...", "\x00", "\x85", "\u2028", "@", "`", "# c", ": :", "\t"]
)  # fmt: skip
KEYS = st.sampled_from(
    ["name", "seed", "data", "optim", "lr", "probe", "lrs", "augment", "crop_scale", "x", "<<", "? ["]
)
LINES = st.tuples(
    st.sampled_from(["", " ", "  ", "\t"]), KEYS, st.sampled_from([": ", ":", " "]), SCALARS | st.text(max_size=6)
)


def check(path, payload):
    path.write_bytes(payload)
    try:
        cfg.load_config(path)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        str(error).encode()


@fuzz
@given(st.binary(max_size=100))
def test_no_bytes(tmp_path, payload):
    check(tmp_path / "c.yaml", payload)


@fuzz
@given(st.lists(LINES.map("".join), max_size=6))
def test_no_lines_that_look_like_settings(tmp_path, lines):
    check(tmp_path / "c.yaml", "\n".join(lines).encode(errors="surrogatepass"))


@fuzz
@given(st.data())
def test_no_flipped_bits_or_cut_or_doubled_part_of_a_real_one(tmp_path, data):
    good = bytearray(cfg.to_yaml(cfg.load_config()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at, end = sorted((data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, len(good) - 1))))
        how = data.draw(st.sampled_from(["flip", "cut", "double"]))
        if how == "flip":
            good[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            good[at:end] = b"" if how == "cut" else good[at:end] * 2
        if not good:
            break
    check(tmp_path / "c.yaml", bytes(good))


@pytest.mark.parametrize(
    "text",
    [
        "probe: {lrs: &a [*a]}", "probe: &a {lrs: *a}", "&a {probe: *a}", "[" * 5000, "{a: " * 3000, "- " * 5000,
        "name: " + "9" * 5000, "seed: " + "9" * 5000, "seed: 0x" + "f" * 5000, "optim: {lr: " + "9" * 5000 + "}",
        'name: "\\ud800"', 'name: "\\x00"', '"\\ud800": 1', "name: !!binary aGk=", "name: !!timestamp 2024-99-99",
        "!!set {a}", "? [a]\n: b", "? {a: b}\n: c", "<<: {a: b}", "name: !!python/object/apply:os.getcwd []",
        "optim: {<<: [1]}", "a: &x 1\nb: *y", "%TAG ! !\n---\nname: x", "name: x\n---\nname: y", "\ufeffname: x",
        "probe: {lrs: !!omap [a: 1]}", "seed: !!int ''", "seed: !!int '-'", "optim: {lr: !!float ''}",
        "seed: !!bool x", "name: !!null x", "seed: !!float x", "name: !!str [a]", "data: !!map [a]",
        "probe: {lrs: !!seq {a: b}}",
    ],
)  # fmt: skip
def test_hostile_texts(tmp_path, text):
    check(tmp_path / "c.yaml", text.encode(errors="surrogatepass"))


def test_aliases_cannot_make_a_small_file_a_large_one(tmp_path):
    """Each line ten times the one before: a thousand bytes that would become ten thousand million values."""
    lines = ["  - &a0 [0, 0]", *(f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11))]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(["probe:", "  lrs:", *lines]))
    with pytest.raises(ConfigError, match=r"line 4: not valid YAML: an alias \(\*a0\) is not supported"):
        cfg.load_config(path)


@fuzz
@given(st.text(max_size=40))
def test_the_reader_alone(text):
    try:
        yaml12.loads(text, "x")
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
