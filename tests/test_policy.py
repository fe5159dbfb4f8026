import pytest

from jax_eplb.simulate import NONE, ORACLE, STATIC, Policy, every, online, threshold


def test_policies_say_what_they_do():
    policies = [NONE, STATIC, every(1), threshold(0.25), online(0.9, 4, 8), ORACLE]
    assert [policy.describe() for policy in policies] == [
        "none",
        "static",
        "every window",
        "every window, above 0.25, decay 0.8",
        "every 8 windows, decay 0.9, 4 moves",
        "oracle",
    ]
    assert [policy.follows for policy in policies] == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "interval is 0; use an integer of 1 or more"),
        ({"max_moves": 1.5}, "max_moves is 1.5; use an integer of 1 or more"),
        ({"decay": 0.0}, "decay is 0.0; use a number above 0"),
        ({"decay": float("nan")}, "decay is nan"),
        ({"threshold": -0.1}, "threshold is -0.1; use an imbalance of 0 or more"),
        ({"planned": False, "interval": 2}, "planned is False, the initial layout for good"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Policy(**settings)
