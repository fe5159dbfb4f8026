from jax_eplb.commands.progress import progress_bars


def test_bars_count_on_standard_error_and_leave_standard_output_alone(capsys):
    with progress_bars() as bars:
        task = bars.add_task("serving", total=3)
        bars.update(task, completed=3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "serving" in err
    assert "3/3" in err
