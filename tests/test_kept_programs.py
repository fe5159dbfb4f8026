import os
import platform

import jax
import pytest

from jax_eplb.commands.kept_programs import keep_programs
from tests.command_line import fail


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
    """As for a user who has told JAX nothing; and all is as before afterwards."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache_folder_by_machine(tmp_path):
    keep_programs()
    folder = tmp_path / "caches/jax_eplb" / platform.node()
    assert folder.is_dir()
    assert jax.config.values["jax_compilation_cache_dir"] == str(folder)


def test_without_the_variable_it_is_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == str(
        tmp_path / ".cache/jax_eplb" / platform.node()
    )


def test_what_jax_was_told_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        keep_programs()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert not (tmp_path / "caches").exists()


def test_where_no_folder_can_be_made_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a folder of another user
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--model", "none.yaml", "--dataset", "none.jsonl", "--ep-size", "4"],
        ["demo", "--num-slots", "3"],
        ["demo", "--online", "--num-slots", "3"],
    ],
    ids=["run", "demo", "demo --online"],
)
def test_commands_that_serve_keep_programs(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    fail(capsys, *command)
    assert jax.config.values["jax_compilation_cache_dir"] == str(
        tmp_path / "caches/jax_eplb" / platform.node()
    )


def test_several_processes_keep_them_where_they_are_told(capsys):
    """Each would look in a folder of its own, and wait for those that find nothing there."""
    files = ["--model", "none.yaml", "--dataset", "none.jsonl", "--ep-size", "4"]
    assert "--num-processes" in fail(
        capsys, "run", *files, "--distributed", "--coordinator", "localhost:1"
    )
    assert jax.config.values["jax_compilation_cache_dir"] is None
