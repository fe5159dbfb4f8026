import os
import platform

import jax
import pytest

from jax_eplb.commands.kept_programs import keep_programs


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
