"""Configurations, their bits, and the files they are read from."""

import dataclasses
import json

import pytest

from qjl.methods.balanced import Balanced
from qjl.methods.identity import Identity
from qjl.methods.qjl import QJL
from qjl.methods.uniform import TokenUniform
from qjl.presets import DEFAULT_PRESET, PRESETS, CacheConfig, LayerOverride, from_dict, resolve, to_dict

every_preset = pytest.mark.parametrize("name", PRESETS)
PLAIN = {"key": {"method": "qjl"}, "value": {"method": "uniform"}}


@every_preset
def test_a_preset_goes_by_its_name(name):
    assert resolve(name) is PRESETS[name]
    assert resolve(name).name == name
    assert resolve(name).summary


def test_the_default_is_a_preset():
    assert resolve(DEFAULT_PRESET).name == DEFAULT_PRESET


def test_a_configuration_is_its_own_preset():
    config = CacheConfig(Identity(), Identity())
    assert resolve(config) is config


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("full", (16, 16)),
        ("qjl-1", (1.125, 2.125)),
        ("qjl-2", (2.125, 2.125)),
        ("b1", (1.625, 1.625)),
        ("b2", (2.125, 2.125)),
        ("b3", (3.125, 2.125)),
        ("b3-3", (3.125, 3.125)),
        ("b4", (4.125, 4.125)),
    ],
)
def test_true_bits_of_the_presets_at_head_dim_64(name, bits):
    assert PRESETS[name].bits(64) == bits
    assert PRESETS[name].bits(64, 30) == bits


def test_qjl_as_published_takes_4_27_bits_and_5_27_in_its_first_layers():
    config = PRESETS["qjl-paper"]
    first, last = (config.for_layer(index)[0].bits(128) for index in (0, 31))
    assert (round(first, 2), round(last, 2)) == (5.27, 4.27)
    assert config.bits(128, 32) == ((15 * first + 17 * last) / 32, 3)
    assert (config.sinks, config.recent) == (0, 64)


def test_overrides_hold_for_their_layers_alone():
    config = PRESETS["qjl-paper"]
    assert [config.for_layer(index)[0].sketch_ratio for index in (0, 14, 15, 31)] == [4, 4, 2, 2]


def test_later_overrides_win_and_leave_alone_what_they_do_not_name():
    one, other = TokenUniform(4), TokenUniform(8)
    overrides = (LayerOverride(0, 4, value=one), LayerOverride(2, 6, key=Identity()), LayerOverride(3, 4, value=other))
    config = CacheConfig(QJL(), TokenUniform(), overrides=overrides)
    keys, values = zip(*(config.for_layer(index) for index in range(7)), strict=True)
    assert keys == (QJL(), QJL(), *[Identity()] * 4, QJL())
    assert values == (one, one, one, other, *[TokenUniform()] * 3)


@every_preset
def test_a_preset_survives_json(name):
    assert from_dict(json.loads(json.dumps(to_dict(PRESETS[name])))) == PRESETS[name]


@every_preset
def test_a_preset_survives_a_file(name, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(to_dict(PRESETS[name])))
    assert resolve(path) == resolve(str(path)) == PRESETS[name]


def test_a_file_needs_no_more_than_two_methods(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"key": {"method": "balanced", "num_bits": 4}, "value": {"method": "uniform"}, "recent": 64}')
    assert resolve(path) == CacheConfig(Balanced(4), TokenUniform(), recent=64, name="mine")


@every_preset
def test_another_seed_changes_the_projections_and_not_the_bits(name):
    config = PRESETS[name].with_seed(7)
    assert config.bits(64, 30) == PRESETS[name].bits(64, 30)
    for index in (0, 20):
        for quantizer in config.for_layer(index):
            assert getattr(quantizer, "seed", 7) == 7


def test_seeds_reach_overrides():
    assert PRESETS["qjl-paper"].with_seed(7).overrides[0].key.seed == 7


def test_a_window_replaces_a_preset_s_own_unless_it_is_none():
    config = PRESETS["qjl-paper"]
    assert config.with_window(None) is config
    assert config.with_window(0) == dataclasses.replace(config, recent=0)


@pytest.mark.parametrize("name", ["sinks", "recent", "key", "name"])
def test_a_configuration_cannot_be_changed(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(PRESETS["b3"], name, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "needs the fields key and value"),
        ({"key": {"method": "qjl"}}, "needs the fields key and value"),
        (PLAIN | {"key": {"method": "zip"}}, "needs a method for keys and values, one of identity, qjl"),
        (PLAIN | {"key": "qjl"}, "needs a method for keys and values"),
        (PLAIN | {"key": {"num_bits": 2}}, "needs a method for keys and values"),
        (PLAIN | {"window": 3}, "has no field 'window'"),
        (PLAIN | {"key": {"method": "qjl", "m": 3}}, "method 'qjl' in preset 'bad' has no field 'm'"),
        (PLAIN | {"key": {"method": "balanced", "num_bits": "three"}}, "a value of the wrong type"),
        (PLAIN | {"key": {"method": "balanced", "num_bits": 9}}, "num_bits must lie between 0 and 8"),
        (PLAIN | {"key": {"method": "qjl", "group_size": 0}}, "a group_size that divides 64"),
        (PLAIN | {"sinks": "four"}, "a value of the wrong type"),
        (PLAIN | {"sinks": -1}, "cannot be negative"),
        (PLAIN | {"recent": -1}, "cannot be negative"),
        (PLAIN | {"overrides": [{"first": 1}]}, "misses a field"),
        (PLAIN | {"overrides": [3]}, "needs the fields first and stop"),
        (
            PLAIN | {"overrides": [{"first": 0, "stop": 1, "last": 2}]},
            "an override in preset 'bad' has no field 'last'",
        ),
        (PLAIN | {"overrides": [{"first": 0, "stop": 1, "key": {}}]}, "needs a method for keys and values"),
    ],
)
def test_a_file_with_a_wrong_field_is_refused(fields, message, tmp_path, refuses):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(fields))
    with refuses(message):
        resolve(path)


@pytest.mark.parametrize(
    "fields",
    [
        PLAIN | {"recent": 1.5},
        PLAIN | {"key": {"method": "qjl", "sketch_ratio": "2"}},
        PLAIN | {"key": {"method": "qjl", "seed": 1.5}},
        PLAIN | {"key": {"method": ["qjl"]}},
        PLAIN | {"overrides": 3},
        PLAIN | {"overrides": [{"first": "a", "stop": 3}]},
    ],
)
def test_a_file_with_a_value_of_the_wrong_type_is_refused(fields, tmp_path, refuses):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(fields))
    with refuses("wrong type"):
        resolve(path)


@pytest.mark.parametrize("content", [b"", b"{", b"{'key': 1}", b"\xff\xfe", b"key: qjl\nvalue: uniform"])
def test_a_malformed_file_is_refused(content, tmp_path, refuses):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with refuses("is not readable JSON"):
        resolve(path)


def test_a_missing_file_is_refused(tmp_path, refuses):
    with refuses("absent.json does not exist"):
        resolve(tmp_path / "absent.json")


def test_a_folder_is_refused(tmp_path, refuses):
    (tmp_path / "folder.json").mkdir()
    with refuses("is not readable JSON"):
        resolve(tmp_path / "folder.json")


@pytest.mark.parametrize("name", ["b5", "", "B3", "qjl.yaml"])
def test_an_unknown_name_is_refused_with_the_known_ones(name, refuses):
    with refuses(f"unknown preset {name!r}: choose one of full, b1, b2"):
        resolve(name)
