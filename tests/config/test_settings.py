from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import fails

from qlora_kit.config.files import read_settings_file
from qlora_kit.config.rules import convert, default_of
from qlora_kit.config.settings import GROUPS, AdapterConfig, BaseConfig, DataConfig, RunConfig, SearchConfig, settings
from qlora_kit.errors import UserError


def test_every_setting_has_a_name_of_its_own_and_a_help_line():
    names = [field.name for _, field, _ in settings()]
    assert len(names) == len(set(names)) > 30
    assert all(field.metadata["help"] for _, field, _ in settings())


def test_groups_are_the_fields_of_a_run():
    fields = {f.name: f.default_factory for f in dataclasses.fields(RunConfig) if f.name in GROUPS}
    assert fields == GROUPS


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1


def test_every_default_obeys_its_rule_and_survives_json(tmp_path):
    config = RunConfig()
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"settings": config.to_dict()}))
    assert RunConfig.from_flat(read_settings_file(file)) == config


def test_text_as_given_on_the_command_line_becomes_values():
    config = RunConfig.from_flat(
        {
            "r": "8",
            "lr": "2e-4",
            "columns": "prompt=a,completion=b",
            "targets": "q_proj,v_proj",
            "pack": True,
            "alpha": "4",
        }
    )
    assert config.adapter == AdapterConfig(r=8, alpha=4.0, targets=("q_proj", "v_proj"))
    assert config.data.columns == {"prompt": "a", "completion": "b"}
    assert config.data.pack is True


def test_all_faults_are_reported_at_once():
    flat = {"bits": "5", "r": "0", "lr": "fast", "rnak": "8", "eval_fraction": "1", "seed": "-1", "pack": "maybe"}
    with pytest.raises(UserError) as caught:
        RunConfig.from_flat(flat)
    text = str(caught.value)
    assert {fault.setting for fault in caught.value.faults} == set(flat)
    assert "bits = 5: must be one of 4, 8, 16, 32" in text
    assert "r = 0: must be at least 1" in text
    assert "must be a number" in text
    assert "must be true or false" in text


@pytest.mark.parametrize(("wrong", "right"), [("bit", "bits"), ("batchsize", "batch_size"), ("max_step", "max_steps")])
def test_an_unknown_setting_suggests_the_nearest(wrong, right):
    with pytest.raises(UserError, match=f"Did you mean {right}"):
        RunConfig.from_flat({wrong: 1})


def test_a_name_that_is_mapped_twice_is_refused():
    with pytest.raises(UserError) as caught:
        RunConfig.from_flat({"columns": "source=a, target=c,source =b,target=c"})
    assert "columns = 'source=a, target=c,source =b,target=c': names 'source' and 'target' more than once" in str(
        caught.value
    )
    assert len(caught.value.faults) == 1


def test_rules_hold_in_the_python_door_too():
    with pytest.raises(UserError, match=r"^full = True"):
        BaseConfig(full=True)
    with pytest.raises(UserError, match=r"^eval_fraction = 0"):
        DataConfig(eval_data="x", eval_fraction=0.1)
    with pytest.raises(UserError, match=r"^report_to = "):
        RunConfig(report_to=("tensorbord",))


def test_a_mistake_names_the_field_in_python_and_the_flag_on_the_command_line(capsys):
    with pytest.raises(UserError) as caught:
        BaseConfig(bits=5)
    assert str(caught.value) == "bits = 5: must be one of 4, 8, 16, 32.\n    For example bits=4."
    err = fails(capsys, "train", "--bits", "5")
    assert err == "error: --bits = 5: must be one of 4, 8, 16, 32.\n    For example --bits 4.\n"


def test_other_settings_in_a_message_are_named_in_the_same_way(capsys):
    with pytest.raises(UserError) as caught:
        RunConfig.from_flat({"full": True})
    assert str(caught.value) == "full = True: needs unquantized weights, not bits=4.\n    Add bits=16."
    err = fails(capsys, "train", "--full")
    assert err == "error: --full = True: needs unquantized weights, not --bits 4.\n    Add --bits 16.\n"


@pytest.mark.parametrize("group", [*GROUPS.values(), RunConfig, SearchConfig])
def test_settings_are_given_by_name(group):
    first = next(iter(dataclasses.fields(group)))
    with pytest.raises(TypeError, match="positional"):
        group(default_of(first))


def test_a_configuration_file_in_yaml_may_be_flat_or_grouped(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batch-size: 2\nlr: 2e-4\nadapter:\n  r: 4\ndata: some.jsonl\n")
    config = RunConfig.from_flat(read_settings_file(file))
    assert (config.optim.batch_size, config.optim.lr, config.adapter.r, config.data.data) == (2, 2e-4, 4, "some.jsonl")


def test_repeating_a_run_leaves_out_where_it_was_written(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"settings": {"out": "x", "overwrite": True, "resume": "y", "adapter": {"r": 2}}}))
    assert read_settings_file(file) == {"r": 2}


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [", "just text"])
def test_a_configuration_file_that_is_no_mapping_is_refused(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"^config = "):
        read_settings_file(file)


@pytest.mark.parametrize(
    ("name", "content", "twice"),
    [
        ("a.yaml", "lr: 1e-3\nr: 4\nlr: 2e-3\nr: 8\n", "'lr' and 'r'"),
        ("a.yaml", "adapter:\n  r: 4\n  r: 8\n", "'r'"),
        ("a.yaml", "adapter:\n  r: 4\nr: 8\n", "'r'"),
        ("a.yaml", "batch-size: 2\nbatch_size: 4\n", "'batch_size'"),
        ("a.json", '{"lr": 1, "lr": 2}', "'lr'"),
        ("a.json", '{"settings": {"adapter": {"r": 2, "r": 4}}}', "'r'"),
    ],
)
def test_a_setting_that_a_file_gives_twice_is_refused(tmp_path, name, content, twice):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError, match=f"{name}': gives {twice} more than once"):
        read_settings_file(file)


def test_what_a_yaml_file_merges_may_be_given_anew(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("adapter: &own {r: 4, dropout: 0.1}\noptim:\n  <<: {lr: 1e-3, batch_size: 2}\n  lr: 2e-3\n")
    assert read_settings_file(file) == {"r": 4, "dropout": 0.1, "lr": "2e-3", "batch_size": 2}


def test_a_missing_configuration_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_settings_file(tmp_path / "none.yaml")


@given(st.data())
def test_every_value_written_as_text_reads_back_the_same(data):
    _, _, hint = data.draw(st.sampled_from([s for s in settings() if s[2] in (int, float, bool, str)]))
    strategies = {int: st.integers(-(10**9), 10**9), float: st.floats(-1e9, 1e9), bool: st.booleans(), str: st.text()}
    value = data.draw(strategies[hint])
    assert convert(repr(value) if hint is not str else value, hint) == value


@pytest.mark.parametrize(
    ("value", "hint"), [("1.5", int), ("nan", float), ("", int), (True, int), ("2", bool), (None, int)]
)
def test_values_of_the_wrong_type_are_refused(value, hint):
    with pytest.raises(ValueError, match="must"):
        convert(value, hint)


def test_defaults_of_mappings_are_not_shared():
    field = next(f for _, f, _ in settings() if f.name == "columns")
    assert default_of(field) is not default_of(field)
