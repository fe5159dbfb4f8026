"""The options of `jax-eplb plan`: their values, and what is refused."""

import argparse

import pytest

from jax_eplb.commands.plan_options import add_plan_options

NEEDED = ["recording.npz", "--ep-size", "4", "-o", "plan.yaml"]


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    return parser.parse_args([*NEEDED, *arguments])


def test_defaults_ask_for_a_plan_from_load_alone():
    options = parse()
    assert (options.effort, options.split, options.method) == ("default", "even", "search")
    assert (options.num_nodes, options.num_groups) == (1, 1)
    assert options.previous is options.max_moves is options.capacity is options.num_slots is None
    assert options.cross_node_weight is None
    assert not any((options.spread_replicas, options.verbose, options.json))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max-moves", "0", [0]),
        ("max-moves", "8,0,all", [8, 0, None]),
        ("capacity", "1,0.5,2e0", [1.0, 0.5, 2.0]),
        ("cross-node-weight", "0.25", 0.25),
        ("effort", "best", "best"),
        ("split", "balanced", "balanced"),
        ("num-nodes", "2", 2),
    ],
)
def test_values_are_read(name, text, value):
    assert getattr(parse(f"--{name}", text), name.replace("-", "_")) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("max-moves", "8,-1", "'-1' is not an integer of 0 or more"),
        ("max-moves", "8,", "'' is not an integer of 0 or more"),
        ("max-moves", "some", "'some' is not an integer of 0 or more"),
        ("capacity", "1,fast", "'1,fast' is not a list of numbers"),
        ("capacity", "1,0", "each rank's speed must be above 0; leave a rank that is gone out"),
        ("capacity", "1,nan", "each rank's speed must be above 0"),
        ("cross-node-weight", "much", "invalid float value: 'much'"),
        ("effort", "much", "invalid choice: 'much'"),
        ("num-groups", "0", "'0' is not an integer of 1 or more"),
    ],
)
def test_wrong_values_are_explained(capsys, name, text, message):
    with pytest.raises(SystemExit) as stop:
        parse(f"--{name}={text}")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
